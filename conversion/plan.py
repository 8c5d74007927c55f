"""What a job writes, as data: every output tensor with its shape, dtype, operation and source tensors.

Layouts (`weight_mapping_mono_internvl` has the names of the first two):

    native     ours
    official   OpenGVLab/Mono-InternVL-2B
    internlm2  the dense decoder: official names without `language_model.` and without V-experts, grouped `wqkv`
    llama      the dense decoder as in Llama, InternLM3, Qwen2 and Qwen3: `model.` for `model.language_model.`
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from ..common.parameters import build_on_meta
from ..configuration_mono_internvl import MonoInternVLConfig
from ..weight_mapping_mono_internvl import RENAMINGS, grouped_rows, merge_grouped_qkv, split_grouped_qkv
from .source import Checkpoint


# Upstream's standard deviation of what it initialises, and transformers'.
INITIAL_STD = 0.02
HEAD, EMBEDDING = "lm_head.weight", "model.language_model.embed_tokens.weight"
# Parts of a name that a dense decoder has nothing for.
_NEW = re.compile(r"^model\.(vision_embeddings|multi_modal_projector|learnable_queries)\.|\.output_gate\.")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Tables that old checkpoints carry and everyone computes.
_COMPUTED = re.compile(r"(rotary_emb|rope)\.inv_freq$")
_SHOWN = 5


@dataclass(frozen=True)
class Output:
    """One tensor to write.

    `operation`: `copy`; `query`, `key`, `value` (a part of a grouped wqkv) and `group` (their inverse); `mean rows` and
    `random rows` (the source and new rows behind it); `random`, `zeros`, `ones` (no source).
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    operation: str
    sources: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Plan:
    """All outputs in the order in which they are written, and what `produce` needs besides the source."""

    outputs: tuple[Output, ...]
    heads: dict[str, int]
    seed: int = 0

    @property
    def nbytes(self) -> int:
        return sum(output.nbytes for output in self.outputs)


def head_layout(config: MonoInternVLConfig) -> dict[str, int]:
    """Arguments of `split_grouped_qkv`."""
    text = config.text_config
    return {"heads": text.num_attention_heads, "kv_heads": text.num_key_value_heads, "head_dim": text.head_dim}


def stored_dtype(config: MonoInternVLConfig) -> torch.dtype:
    """The dtype that the configuration says its weights have."""
    if not isinstance(config.dtype, torch.dtype):
        raise TypeError(f"config.dtype must be a torch.dtype here, not {config.dtype!r}")
    return config.dtype


def native_shapes(config: MonoInternVLConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of everything a native checkpoint holds; a tied head is not among it."""
    shapes = {name: tuple(tensor.shape) for name, tensor in build_on_meta(config).state_dict().items()}
    if config.tie_word_embeddings:
        del shapes[HEAD]
    return shapes


# --------------------------------------------------------------------------------------------------------------- names


def layout_name(native: str, layout: str) -> str:
    """A native name in another layout; q, k and v projections of the grouped layouts have none (`recipe`)."""
    if layout == "native":
        return native
    if layout == "llama":
        return native.replace("model.language_model.", "model.", 1)
    for official, ours in RENAMINGS:
        native = re.sub(ours, official.replace("^", "").replace("\\", ""), native)
    return native.removeprefix("language_model.") if layout == "internlm2" else native


def recipe(native: str, layout: str) -> tuple[str, str]:
    """(operation, source tensor): how a native tensor comes out of a layout."""
    part = re.search(r"\.self_attn\.([qkv])_proj\.", native)
    if part is None or layout in ("native", "llama"):
        return "copy", layout_name(native, layout)
    operation = {"q": "query", "k": "key", "v": "value"}[part[1]]
    return operation, layout_name(native.replace(part[0], ".attention.wqkv."), layout)


def source_shape(native_shape: tuple[int, ...], operation: str, heads: dict[str, int]) -> tuple[int, ...]:
    """The shape of the tensor that `recipe` names."""
    return native_shape if operation == "copy" else (grouped_rows(**heads), *native_shape[1:])


# --------------------------------------------------------------------------------------------------------------- plans


def plan_native(config: MonoInternVLConfig, source: Checkpoint, layout: str) -> Plan:
    """`source` in our layout, dtypes kept.

    Raises:
        ValueError: the source's tensors are not those of `config`.
    """
    shapes, heads = _present_shapes(config, source, layout), head_layout(config)
    recipes = {name: recipe(name, layout) for name in shapes}
    check_tensors(source, {of: source_shape(shapes[name], op, heads) for name, (op, of) in recipes.items()})
    outputs = [
        Output(name, shapes[name], source.tensors[of].dtype, operation, (of,))
        for name, (operation, of) in recipes.items()
    ]
    return Plan(tuple(outputs), heads)


def plan_official(config: MonoInternVLConfig, source: Checkpoint) -> Plan:
    """A native `source` in the official layout, dtypes kept.

    Raises:
        ValueError: the source's tensors are not those of `config`.
    """
    shapes, heads = _present_shapes(config, source, "native"), head_layout(config)
    check_tensors(source, shapes)
    outputs = []
    for name, shape in shapes.items():
        operation, target = recipe(name, "official")
        dtype = source.tensors[name].dtype
        if operation == "copy":
            outputs.append(Output(target, shape, dtype, "copy", (name,)))
        elif operation == "query":
            parts = tuple(name.replace(".q_proj.", f".{part}_proj.") for part in "qkv")
            if len({source.tensors[part].dtype for part in parts}) > 1:
                raise ValueError(f"{', '.join(parts)} differ in dtype, and the official layout has one tensor for them")
            outputs.append(Output(target, source_shape(shape, operation, heads), dtype, "group", parts))
    return Plan(tuple(outputs), heads)


def plan_expansion(
    config: MonoInternVLConfig, dense: Checkpoint, layout: str, *, new_rows: int, dtype: torch.dtype | None, seed: int
) -> Plan:
    """The dense decoder `dense` as the Mono-InternVL `config`; `dtype` None keeps each tensor's (new: `config`'s).

    Raises:
        ValueError: the source's tensors are not those of `config`'s text path.
    """
    heads, shapes = head_layout(config), _present_shapes(config, dense, layout)
    recipes, expected = {}, {}
    for name, shape in shapes.items():
        if _NEW.search(name):
            continue
        operation, of = recipe(name.replace(".visual_mlp.", ".mlp.").replace(".visual_", "."), layout)
        expected[of] = source_shape(shape, operation, heads)
        if name in (EMBEDDING, HEAD) and new_rows:
            expected[of] = (shape[0] - new_rows, *shape[1:])
            # A tied matrix is a head too.
            operation = "mean rows" if name == HEAD or config.tie_word_embeddings else "random rows"
        recipes[name] = operation, of
    check_tensors(dense, expected)
    outputs = []
    for name, shape in shapes.items():
        if name in recipes:
            operation, of = recipes[name]
            outputs.append(Output(name, shape, dtype or dense.tensors[of].dtype, operation, (of,)))
        else:
            outputs.append(Output(name, shape, stored_dtype(config), _initial(name)))
    return Plan(tuple(outputs), heads, seed)


def _present_shapes(config: MonoInternVLConfig, source: Checkpoint, layout: str) -> dict[str, tuple[int, ...]]:
    """`native_shapes`; with the head that a checkpoint of tied matrices holds all the same."""
    shapes = native_shapes(config)
    if HEAD not in shapes and layout_name(HEAD, layout) in source.tensors:
        shapes[HEAD] = shapes[EMBEDDING]
    return shapes


def _initial(name: str) -> str:
    if name.endswith(("bias", "class_embedding")):
        return "zeros"
    return "ones" if name.endswith("layer_norm.weight") else "random"


def check_tensors(source: Checkpoint, expected: dict[str, tuple[int, ...]]) -> None:
    """Hold what a checkpoint has against what it should have.

    Raises:
        ValueError: tensors are missing, unexpected, mis-shaped or of a dtype that is no float; all kinds are named.
    """
    found = {name: info for name, info in source.tensors.items() if not _COMPUTED.search(name)}
    missing = [name for name in expected if name not in found]
    problems = []
    if missing:
        place = str(source.index or source.folder)
        others = sorted(source.folder.glob(f"*{source.files[0].suffix}"))
        strays = [path.name for path in others if path not in source.files]
        hint = f" (the index does not list {', '.join(strays)})" if source.index and strays else ""
        problems.append(f"{place} lacks {_some(missing)}{hint}")
    by_kind = {
        "unexpected": [f"{name} in {info.file}" for name, info in found.items() if name not in expected],
        "mis-shaped": [
            f"{name} in {found[name].file} is {list(found[name].shape)}, not {list(shape)}"
            for name, shape in expected.items()
            if name in found and found[name].shape != shape
        ],
        "of a dtype that is not supported": [
            f"{name} in {found[name].file} is {found[name].dtype}"
            for name in expected
            if name in found and found[name].dtype not in _FLOATS
        ],
    }
    problems += [f"{len(items)} {kind}: {_some(items)}" for kind, items in by_kind.items() if items]
    if problems:
        raise ValueError("; ".join(problems))


def _some(items: list[str]) -> str:
    rest = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + rest


# ---------------------------------------------------------------------------------------------------------- operations


def produce(output: Output, plan: Plan, source: Checkpoint) -> Iterator[torch.Tensor]:
    """The values of an output as consecutive rows in its dtype."""
    for piece in _pieces(output, plan, source):
        yield piece.to(output.dtype).contiguous()


def _pieces(output: Output, plan: Plan, source: Checkpoint) -> Iterable[torch.Tensor]:
    operation, sources = output.operation, output.sources
    if operation == "copy":
        return source.pieces(sources[0])
    if operation in ("query", "key", "value"):
        parts = split_grouped_qkv(source.read(sources[0]), **plan.heads)
        return [parts[("query", "key", "value").index(operation)]]
    if operation == "group":
        q, k, v = (source.read(name) for name in sources)
        return [merge_grouped_qkv(q, k, v, **plan.heads)]
    if operation in ("mean rows", "random rows"):
        return _grown(output, plan, source)
    if operation == "random":
        return [_normal(output.shape, plan.seed, output.name)]
    return [torch.zeros(output.shape) if operation == "zeros" else torch.ones(output.shape)]


def _grown(output: Output, plan: Plan, source: Checkpoint) -> Iterator[torch.Tensor]:
    """The old rows, then the new ones: all of them the mean of the old (float64 sums), or drawn."""
    (name,) = output.sources
    old_rows, width = source.tensors[name].shape
    new = (output.shape[0] - old_rows, width)
    total = torch.zeros(width, dtype=torch.float64)
    for piece in source.pieces(name):
        if output.operation == "mean rows":
            total += piece.float().sum(0)
        yield piece
    mean = (total / old_rows).float().expand(new)
    yield mean if output.operation == "mean rows" else _normal(new, plan.seed, output.name)


def _normal(shape: tuple[int, ...], seed: int, name: str) -> torch.Tensor:
    """float32, mean 0, standard deviation `INITIAL_STD`; a tensor's values depend on the seed and its name alone."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.randn(shape, generator=generator) * INITIAL_STD
