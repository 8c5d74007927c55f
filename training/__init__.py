"""Training: the plate world's pictures and questions, the stages as data, datasets, collator and Trainer."""
