"""The built-in world: 32-pixel scenes with captions, small enough for two CPU cores.

Command:   threetowers train shapes --method baseline
           threetowers train shapes --third shapes:matched
Hardware:  two CPU cores
Result:    `make claims` writes docs/claims.md
"""

from threetowers.config import InputConfig, ObjectiveConfig, OptimConfig, PairConfig, RunConfig


def shapes() -> RunConfig:
    """A 0.2 M-parameter normaliser-free ResNet and two text layers of width 96, 250 steps of 128."""
    return RunConfig(
        data="shapes",
        classes="shapes",
        steps=250,
        batch_size=128,
        eval_every_steps=125,
        pair=PairConfig(
            embed_dim=96,
            vision={"timm_model_name": "test_nfnet", "timm_pool": "", "image_size": 32},
            text={"context_length": 32, "width": 96, "heads": 4, "layers": 2},
            tokenizer="trained",
            vocab_size=512,
            mean=(0.5, 0.5, 0.5),
            std=(0.25, 0.25, 0.25),
        ),
        # left and right are in the captions, so no mirror images; scenes fill the frame, so gentle crops
        inputs=InputConfig(crop_scale=(0.8, 1.0), crop_ratio=(0.9, 1.1), workers=0),
        objective=ObjectiveConfig(init_scale=10.0),
        optim=OptimConfig(lr=2e-3, warmup_steps=40, scale_lr_multiplier=0.1),
    )
