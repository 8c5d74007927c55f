"""Ask about a video: a file, or without one a red circle that moves from left to right in 40 frames drawn here.

    python examples/video.py
    python examples/video.py clip.mp4 "What is shown?" --model OpenGVLab/Mono-InternVL-2B

A file needs PyAV (pip install av). Each question is asked of 1, 2, 4 and 8 frames. The bundled nano has never seen a
video: it takes the frames for one picture and counts the circle more than once (docs/prompts.md).
"""

import argparse
from typing import Any

from PIL import Image, ImageDraw

from mono_internvl import MonoInternVLForCausalLM
from mono_internvl.common.models import load_model, resolve_model


QUESTIONS = ("What color is the circle?", "How many circles are there?", "Describe the image.")


def moving_circle(count: int = 40) -> list[Image.Image]:
    """Frames of 224 x 224 px: a red circle on white, from the upper left to the upper right."""
    frames = []
    for number in range(count):
        frame = Image.new("RGB", (224, 224), "white")
        left = 12 + 144 * number / (count - 1)
        ImageDraw.Draw(frame).ellipse((left, 32, left + 56, 88), fill="red")
        frames.append(frame)
    return frames


def ask(model: MonoInternVLForCausalLM, processor: Any, video: Any, question: str, num_frames: int) -> str:
    """The answer about so many frames of a video, a path, URL or list of frames."""
    parts = [{"type": "video", "video": video}, {"type": "text", "text": question}]
    return model.chat(None, parts, num_frames=num_frames, processor=processor)  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video", nargs="?", help="file or URL; default: frames drawn here")
    parser.add_argument("questions", nargs="*", default=QUESTIONS)
    parser.add_argument("--model", help="folder or Hub id; default: the bundled nano")
    arguments = parser.parse_args()
    model, processor = load_model(resolve_model(arguments.model))
    for question in arguments.questions:
        for num_frames in (1, 2, 4, 8):
            answer = ask(model, processor, arguments.video or moving_circle(), question, num_frames)
            print(f"{question} {num_frames} of its frames: {answer}")


if __name__ == "__main__":
    main()
