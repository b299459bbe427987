"""The list of tasks: each a function from a model's features and an open data set to figures.

A new task is one function and one line here.
"""

from threetowers.evaluate.suite.measured import Task, needs_captions, needs_classes, needs_training
from threetowers.evaluate.suite.on_images import MAIN_SHOTS, few, nearest, probe
from threetowers.evaluate.suite.on_pairs import (
    calibrated,
    composition,
    detected,
    needs_captions_or_classes,
    needs_choices,
    needs_held_out,
    needs_outside,
    retrieval,
    robustness,
    zero_shot,
)

TASKS: dict[str, Task] = {
    "retrieval": Task("captions by images and images by captions", "mean_r@1", retrieval, needs_captions),
    "zero_shot": Task("classification by prompts", "top1", zero_shot, needs_classes),
    "few_shot": Task("classification from 1 to 25 images of each class", f"{MAIN_SHOTS}_shot", few, needs_training),
    "linear_probe": Task("logistic regression on all training images", "top1", probe, needs_training),
    "neighbours": Task("the class of the nearest training images", "top1", nearest, needs_training),
    "calibration": Task("whether zero-shot probabilities can be believed; lower is better", "ece", calibrated,
                        needs_held_out),
    "detection": Task("telling images of no class from the others", "auroc", detected, needs_outside),
    "composition": Task("right captions against ones that differ in a word or in order", "accuracy", composition,
                        needs_choices),
    "robustness": Task("zero-shot or retrieval under six corruptions of five degrees", "mean", robustness,
                       needs_captions_or_classes, asked=True),
}  # fmt: skip
"""Every task of a suite by its name."""
