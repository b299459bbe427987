"""A finished run as ONNX graphs, in the folder layout of transformers.js.

    export_onnx("runs/mine", "exported")
    # onnxruntime.InferenceSession("exported/onnx/text_model.onnx")

The image tower and the text tower are two graphs, and both return unit vectors. onnxruntime runs them before they get
their names, and the vectors are compared with the run's. The tokenizer and the preprocessing are in the files that
transformers and transformers.js read.
Legend: B batch, n tokens of the longest text in it, D embedding, N samples.
"""

import importlib
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer as FastTokenizer
from torch import Tensor, nn

from threetowers.data.tokenize import FileTokenizer
from threetowers.data.transforms import fixed_view, normalise
from threetowers.errors import UsageError
from threetowers.export.card import write_card
from threetowers.export.folder import QUANTIZED, listed, write_json, written_whole
from threetowers.export.inputs import (
    CLEANING,
    end_id,
    pad_id,
    preprocessing_differences,
    processor_settings,
    write_tokenizer,
)
from threetowers.export.samples import CAPTIONS, check_difference, exactness, sample_pictures
from threetowers.export.towers import Encoders, combined_encoders, main_encoders
from threetowers.run.finished import FinishedRun, load_run
from threetowers.towers.frozen.base import first_line
from threetowers.towers.pair import takes_any_length

OPSET = 18
"""The version of ONNX's operators that the graphs use."""
LARGEST = 2**31 - 2**20
"""Bytes of weights that fit into one ONNX file, which ends at 2 GiB."""
BATCHES = (slice(0, 1), slice(1, 4))
"""The samples in batches of one and of three."""
USAGE = """\
`onnx/vision_model.onnx` takes `pixel_values` [batch, 3, {size}, {size}] and returns `image_embeds` [batch, {width}].
`onnx/text_model.onnx` takes `input_ids` [batch, {sequence}] and returns `text_embeds` [batch, {width}].
Both are unit vectors. Their products are cosines; times {scale:.4f} they are the logits of training. Opset {opset}.
{quantized}
```python
import onnxruntime
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer

processor = AutoImageProcessor.from_pretrained("{folder}", backend="pil")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
vision_model = onnxruntime.InferenceSession("{folder}/onnx/vision_model.onnx")
text_model = onnxruntime.InferenceSession("{folder}/onnx/text_model.onnx")

pixels = processor(images=[Image.open("photo.jpg").convert("RGB")], return_tensors="np")["pixel_values"]
tokens = tokenizer(["a photo"], padding={python_padding}, truncation=True, return_tensors="np")["input_ids"]
image = vision_model.run(["image_embeds"], {{"pixel_values": pixels}})[0]
text = text_model.run(["text_embeds"], {{"input_ids": tokens}})[0]
print(image @ text.T)
```

With transformers.js:

```js
import {{ AutoProcessor, AutoTokenizer, CLIPTextModelWithProjection, CLIPVisionModelWithProjection, RawImage }}
  from "@huggingface/transformers";

const processor = await AutoProcessor.from_pretrained("{folder}");
const tokenizer = await AutoTokenizer.from_pretrained("{folder}");
const vision = await CLIPVisionModelWithProjection.from_pretrained("{folder}", {{ dtype: "fp32" }});
const text = await CLIPTextModelWithProjection.from_pretrained("{folder}", {{ dtype: "fp32" }});

const {{ image_embeds }} = await vision(await processor(await RawImage.read("photo.jpg")));
const {{ text_embeds }} = await text(tokenizer(["a photo"], {{ padding: {padding}, truncation: true }}));
```

Differences from training:

{differences}
"""
SMALLER = """
`onnx/vision_model_quantized.onnx` and `onnx/text_model_quantized.onnx` have the same inputs and outputs, and weights of
eight bits; in transformers.js, `dtype: "q8"`. The results below are not theirs.
"""
RESIZING = (
    'Load the image processor with backend="pil" in Python, as training resized images. The pixels of transformers.js '
    "differ by some grey levels."
)


@dataclass(frozen=True)
class _Side:
    """One graph: its network, the names of input and output, the dynamic axes, and the samples for the comparison.

    expected: the vectors that the run computes of all batches, [N, D].
    """

    name: str
    network: nn.Module
    takes: str
    gives: str
    axes: dict[int, Any]
    batches: list[Tensor]
    expected: Tensor

    def run(self, path: Path) -> Tensor:
        """The vectors that onnxruntime computes of all batches with a graph, [N, D]."""
        return torch.cat([*map(open_graph(path), self.batches)])


def export_onnx(run: str | Path, out: str | Path, *, quantize: bool = False, alpha: float = 0.0) -> Path:
    """Writes onnx/vision_model.onnx, onnx/text_model.onnx, tokenizer, settings and README.md; returns the folder.

    The size of the batch is dynamic. The length of texts is dynamic where features do not depend on padding, as in
    open_clip's causal text tower and in encoders of transformers; other towers take texts that are padded to the
    context length. quantize: also write `*_quantized.onnx` with weights of eight bits; how far their vectors are from
    the run's is printed and not limited. alpha: above 0, the convex combination with the third tower, as
    `towers.combined_encoders` says; the image graph holds both image towers then.

    Raises UsageError for a tower that torch cannot export. Raises CheckpointError for an unfinished run, and when the
    vectors of onnxruntime differ from the run's by more than `TOLERANCE`. Nothing is written then.
    Layout: https://huggingface.co/docs/transformers.js, custom models.
    """
    finished = load_run(run)
    _check_libraries()
    spec = finished.architecture.image
    settings = processor_settings(spec, "--to onnx")
    encoders = (
        combined_encoders(finished, Path(run), alpha, "--to onnx") if alpha else main_encoders(finished)
    )
    differences = [*encoders.remarks, *preprocessing_differences(spec), RESIZING, CLEANING]
    own = ("config.json", "onnx", *([QUANTIZED] if quantize else []))
    said = []
    with written_whole(Path(out), own) as folder:
        write_tokenizer(finished.tokenizer, folder)
        write_json(folder / "preprocessor_config.json", settings)
        write_json(folder / "config.json", _config(finished, encoders.width))
        (folder / "onnx").mkdir()
        for side in (_image_side(finished, encoders), _text_side(finished, encoders, folder)):
            path = folder / "onnx" / f"{side.name}_model.onnx"
            _write_graph(side, path)
            difference = float((side.run(path) - side.expected).abs().max())
            check_difference("onnxruntime", f"{side.name} vectors", difference)
            said.append(f"onnxruntime computes the run's {side.name} vectors {exactness(difference)}")
            if quantize:
                said.append(_write_quantized(side, path))
        name = Path(out).absolute().name
        usage = _usage(finished, encoders.width, name, differences, quantize)
        write_card(
            folder, finished, Path(run), library="transformers.js", title="as ONNX graphs", usage=usage, name=name,
            alpha=alpha, tags=("onnx",),
        )  # fmt: skip
    for line in [*(f"checked: {each}" for each in said), *(f"note: {each}" for each in differences)]:
        print(line, file=sys.stderr)
    return Path(out)


def open_graph(path: Path) -> Callable[[Tensor], Tensor]:
    """A function that runs a graph of one input and one output in onnxruntime, on the CPU."""
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors alone
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (taken,) = session.get_inputs()

    def run(inputs: Tensor) -> Tensor:
        (found,) = session.run(None, {taken.name: inputs.numpy()})
        return torch.from_numpy(found)

    return run


def _image_side(finished: FinishedRun, encoders: Encoders) -> _Side:
    spec, pictures = finished.architecture.image, sample_pictures()
    pixels = torch.from_numpy(np.stack([fixed_view(picture, spec) for picture in pictures]))
    batches = [normalise(pixels[part], spec) for part in BATCHES]
    axes, expected = {0: torch.export.Dim("batch")}, encoders.encode_image(pictures)
    return _Side("vision", encoders.image, "pixel_values", "image_embeds", axes, batches, expected)


def _text_side(finished: FinishedRun, encoders: Encoders, folder: Path) -> _Side:
    """The text graph; its samples are tokenized by the tokenizer that was written to the folder."""
    context_length: Any = finished.txt.context_length
    dynamic = takes_any_length(finished.txt)
    if not dynamic and not isinstance(finished.tokenizer, FileTokenizer):
        raise UsageError(
            "--to onnx: the features of this text tower depend on the padding, which in open_clip's vocabulary is the "
            "id 0 and in transformers' tokenizer the end token; export --to open_clip"
        )
    tokenizer = FastTokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(context_length)
    tokenizer.enable_padding(pad_id=pad_id(finished.tokenizer), length=None if dynamic else context_length)
    captions = [list(CAPTIONS[part]) for part in BATCHES]
    batches = [torch.tensor([entry.ids for entry in tokenizer.encode_batch(texts)]) for texts in captions]
    axes = {0: torch.export.Dim("batch")}
    if dynamic:
        # `encode_text` takes another way at the full length; the graph of shorter texts holds there too
        axes[1] = torch.export.Dim("sequence", max=context_length - 1)
    expected = encoders.encode_text(CAPTIONS)
    network = _WithEnd(encoders.text, end_id(finished.tokenizer))
    return _Side("text", network, "input_ids", "text_embeds", axes, batches, expected)


class _WithEnd(nn.Module):
    """Gives texts without an end token one in the last place; transformers.js cuts it off with the rest of a text.

    encode: token ids [B, n] to vectors. end: the id of the end token.
    """

    def __init__(self, encode: nn.Module, end: int) -> None:
        super().__init__()
        self.encode = encode
        self.end = end

    def forward(self, ids: Tensor) -> Tensor:
        cut = (ids != self.end).all(dim=1, keepdim=True)
        last = torch.arange(ids.shape[1], device=ids.device) == ids.shape[1] - 1
        found: Tensor = self.encode(torch.where(cut & last, self.end, ids))
        return found


def _write_graph(side: _Side, path: Path) -> None:
    if (size := sum(p.numel() * p.element_size() for p in side.network.parameters())) > LARGEST:
        raise UsageError(
            f"--to onnx: the {side.name} tower has {size / 2**30:.1f} GiB of weights, and an ONNX file holds at most "
            "2; export --to open_clip"
        )
    sample = side.batches[0]
    if 1 in side.axes:
        sample = sample[:, :3]
    sample = torch.cat([sample, sample])  # an axis of size 1 would become a constant
    try:
        program = torch.onnx.export(
            side.network.eval(),
            (sample,),
            input_names=[side.takes],
            output_names=[side.gives],
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
            dynamic_shapes=(side.axes,),
        )
    except Exception as error:  # torch's exporter raises whatever the code of the network leads to
        raise UsageError(
            f"--to onnx: torch cannot export the {side.name} tower ({first_line(error)}); export --to open_clip"
        ) from error
    assert program is not None
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # file and line that each operator comes from
    program.save(path, external_data=False)


def _write_quantized(side: _Side, path: Path) -> str:
    """Writes the graph with weights of eight bits beside it; returns a line about how far its vectors are off."""
    quantization = importlib.import_module("onnxruntime.quantization")
    target = path.with_name(f"{path.stem}_quantized.onnx")
    logging.disable(logging.WARNING)  # it advises an optimisation that torch's exporter has made
    try:  # onnxruntime has no kernel for convolutions of eight bits on the CPU; Gather is the table of tokens
        quantization.quantize_dynamic(path, target, op_types_to_quantize=["MatMul", "Gemm", "Gather"])
    finally:
        logging.disable(logging.NOTSET)
    cosines = (side.run(target) * side.expected).sum(dim=1)
    return (
        f"{target.name} computes vectors whose cosine with the run's is {float(cosines.mean()):.4f} on average and "
        f"{float(cosines.min()):.4f} at least, on {len(cosines)} samples"
    )


def _check_libraries() -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UsageError(
                f"--to onnx: needs {name} ({first_line(error)}); pip install 'threetowers[onnx]'"
            ) from None


def _config(finished: FinishedRun, width: int) -> dict[str, Any]:
    """config.json; transformers.js reads the type of the model, and the rest describes the graphs."""
    return {
        "model_type": "clip",
        "projection_dim": width,
        "logit_scale_init_value": float(np.log(finished.scale)),
        "text_config": {
            "model_type": "clip_text_model",
            "vocab_size": finished.txt.vocab_size,
            "max_position_embeddings": finished.txt.context_length,
            "eos_token_id": end_id(finished.tokenizer),
            "bos_token_id": None,  # CLIP's own is beyond a small vocabulary
        },
        "vision_config": {"model_type": "clip_vision_model", "image_size": finished.architecture.image.size},
    }


def _usage(
    finished: FinishedRun, width: int, folder: str, differences: Sequence[str], quantized: bool
) -> str:
    dynamic, length = takes_any_length(finished.txt), finished.txt.context_length
    return USAGE.format(
        folder=folder,
        size=finished.architecture.image.size,
        width=width,
        scale=finished.scale,
        opset=OPSET,
        sequence=f"sequence of at most {length}" if dynamic else length,
        padding="true" if dynamic else '"max_length"',
        python_padding=True if dynamic else '"max_length"',
        quantized=SMALLER if quantized else "",
        differences=listed(differences),
    )
