"""ViT-B pairs for a GPU, with CLIP's optimiser settings.

Command:   threetowers train vit-b-32 --data 'shards/{00000..00099}.tar' --third timm:vit_base_patch14_dinov2.lvd142m
Hardware:  one GPU with 80 GB
Result:    not measured yet
"""

from dataclasses import replace

from threetowers.config import InputConfig, OptimConfig, PairConfig, RunConfig


def vit_b_32() -> RunConfig:
    """open_clip's ViT-B-32 at 224 px, batches of 1,024, bf16."""
    return RunConfig(
        steps=20_000,
        batch_size=1024,
        eval_every_steps=1_000,
        checkpoint_every_steps=1_000,
        precision="bf16-autocast",
        pair=PairConfig(model="ViT-B-32"),
        inputs=InputConfig(workers=12),
        optim=OptimConfig(lr=5e-4, weight_decay=0.2, warmup_steps=1_000),
    )


def vit_b_16() -> RunConfig:
    """open_clip's ViT-B-16 at 224 px; otherwise as vit-b-32."""
    return replace(vit_b_32(), pair=PairConfig(model="ViT-B-16"))
