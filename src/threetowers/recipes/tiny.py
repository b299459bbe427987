"""A run that ends in seconds on any data: to see that everything fits together, not to be good.

Command:   threetowers train tiny --data FOLDER --third timm:NAME
Hardware:  two CPU cores
Result:    none worth quoting; raise --steps and take a larger pair for that
"""

from threetowers.config import InputConfig, OptimConfig, PairConfig, RunConfig


def tiny() -> RunConfig:
    """64-pixel images, a 0.35 M-parameter ConvNeXt and one text layer, 100 steps of 32."""
    return RunConfig(
        steps=100,
        batch_size=32,
        log_every_steps=10,
        pair=PairConfig(
            embed_dim=64,
            vision={"timm_model_name": "test_convnext2", "timm_pool": "", "image_size": 64},
            text={"context_length": 32, "width": 64, "heads": 2, "layers": 1},
            tokenizer="trained",
            vocab_size=1024,
        ),
        inputs=InputConfig(workers=0),
        optim=OptimConfig(lr=1e-3, warmup_steps=10),
    )
