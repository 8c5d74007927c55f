"""The plate world: small pictures of plain shapes and printed numbers, with questions and answers, drawn fast.

    plate = sample_plate(random.Random(0))     a layout: what is where, in which colour (no pixels yet)
    image = draw_plate(plate, rng)             its picture, PIL RGB, about a millisecond
    for qa in questions(plate, rng): ...       every question that has one unambiguous answer

The nano model must answer pictures drawn by *other* code (`evaluation_pictures`), so everything that such code may
choose is varied here: size and aspect ratio, shade, background, rotation, star geometry, outline, anti-aliasing, font
and mild damage. What a question leaves open is never varied: items do not overlap, lie inside the picture, contrast
with the background, and a question is asked only where its answer is unique.

Everything random comes from the `random.Random` passed in: one seed gives one plate, one picture and one list of
questions, on machines with the same fonts and the same Pillow. Fonts in HELD_OUT_FONTS are left to the evaluation.
"""
