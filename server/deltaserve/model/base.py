"""The frozen base model as the rest of deltaserve sees it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import huggingface_hub.constants
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from deltaserve.errors import ConfigError, UnsupportedBase
from deltaserve.model import checkpoint, identity
from deltaserve.model.attach import EMBED_OUT, FINAL_HIDDEN, EmbedPoint, change_rows, find_points
from deltaserve.model.attention import ATTENTION_NAME, attach_spec
from deltaserve.model.context import FoldedContext, ForwardContext, PassContext, use
from deltaserve.model.embedding import TunableEmbedding, count_calls, make_embedding_tunable
from deltaserve.model.folded import widen_in_folded_mode
from deltaserve.model.fuse import fuse, make_tunable
from deltaserve.model.fuse_layer import fuse_layers
from deltaserve.model.head import cut_before_head, find_decoder
from deltaserve.model.kv_cache import KVLayout
from deltaserve.model.linear import BaseLinear
from deltaserve.model.norms import TunableNorm, find_norms, watch
from deltaserve.model.packing import find_linears, pack, registered_linears, wrap_head
from deltaserve.model.prefix import prompt_kv
from deltaserve.model.rope import check_rope, choose_longrope_per_row
from deltaserve.model.support import find_layers
from deltaserve.model.trace import Trace, trace
from deltaserve.model.verify import probe_sequences, reference_logits, verify
from deltaserve_kernels import hide_added, stored_rows
from deltaserve_store.spec import BaseSpec, LinearSpec, NormSpec

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_FOLDED_TOKENS = 64


class BaseModel:
    """A loaded base. ``linears[i]`` is the name of the linear that tables call i, ``norms[i]`` that of a norm,
    ``points[i]`` that of an attach point; the head is not among them. ``matrices`` names embedding and head, None where
    adapters cannot change them.

    Passes on different threads do not disturb each other: all state of a pass is in its context.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        linears: Mapping[str, BaseLinear],
        norms: Mapping[str, TunableNorm],
        points: tuple[str, ...],
        spec: BaseSpec,
        kv_layout: KVLayout,
        *,
        embedding: TunableEmbedding | None,
        head: BaseLinear | None,
        longrope_limit: int | None,
        eos_token_ids: tuple[int, ...],
        max_context: int,
        folder: Path,
    ) -> None:
        self.folder = folder
        self.spec = spec
        self.kv_layout = kv_layout
        self.max_context = max_context
        self.eos_token_ids = eos_token_ids
        self.linears = tuple(linears)
        self.norms = tuple(norms)
        self.points = points
        self.dtype = kv_layout.dtype
        self.device = model.device
        self._model = model
        self._linears = dict(linears)
        self._norms = dict(norms)
        self.matrices = (None if embedding is None else embedding.name, None if head is None else head.name)
        self._heads = {} if head is None else {head.name: head}
        self._token_rows: dict[str, Tensor] = {m.name: m.weight for m in (embedding, head) if m is not None}
        self._longrope_limit = longrope_limit
        self._decoder = cut_before_head(model)

    @property
    def vocab_size(self) -> int:
        return self.spec.vocab_size

    @property
    def hidden_size(self) -> int:
        return self.spec.hidden_size

    @property
    def config(self) -> PreTrainedConfig:
        """transformers' configuration of the base, to be read only."""
        return self._model.config

    @property
    def has_kv_regimes(self) -> bool:
        """Whether ``kv_regime`` ever differs from 0."""
        return self._longrope_limit is not None

    def linear(self, name: str) -> BaseLinear:
        """The base weights behind a name of ``linears`` or the head; raises KeyError."""
        return (self._heads if name in self._heads else self._linears)[name]

    def norm(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Weight and bias [H] of a norm of ``norms``, as stored; raises KeyError."""
        norm = self._norms[name]
        return norm.weight, norm.bias

    def token_rows(self, name: str, ids: Tensor) -> Tensor:
        """Rows of the embedding or the head by token, ``ids`` int64 [n] -> [n, width] as stored, zeros for tokens
        beyond the matrix; raises KeyError."""
        weight = self._token_rows[name]
        return stored_rows(weight, ids.to(weight.device))

    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Names of the linears that share an input, group after group in order of execution."""
        names = dict.fromkeys(tuple(self.linears[m.linear] for m in x.group.members) for x in self._linears.values())
        return tuple(names)

    @property
    def num_kv_regimes(self) -> int:
        """How many values ``kv_regime`` has."""
        return 2 if self.has_kv_regimes else 1

    def kv_regime(self, length: int) -> int:
        """Which rope frequencies a sequence of ``length`` tokens uses; 0 for all lengths of most bases.

        K of one regime cannot be read under another: when a growing sequence changes its regime its blocks must be
        computed again, and the regime belongs into a prefix cache's key.
        """
        return int(self._longrope_limit is not None and length > self._longrope_limit)

    def forward(self, input_ids: Tensor, ctx: ForwardContext) -> Tensor:
        """``input_ids`` int64 [T] of a step -> final hidden rows [T, hidden] in the serving dtype; writes K and V."""
        hidden = self._decode(input_ids, ctx.positions, ctx)
        return hidden if ctx.apart is None else change_rows(hidden, ctx.apart, len(self.points) - 1, 1.0)

    def logits(self, hidden_rows: Tensor, ctx: PassContext, out: Tensor | None = None) -> Tensor:
        """Hidden rows [R, hidden] -> float32 [R, vocab], through the model's own head (soft-capping, scaling); into
        ``out`` if given. Where adapters of the step add tokens there are columns for these too, minus infinity in rows
        of others."""
        ctx.head_rows = hidden_rows[None]
        try:
            with use(ctx):
                output = self._model(inputs_embeds=ctx.head_rows, use_cache=False)
        finally:
            ctx.head_rows = None
        logits = output.logits[0].float() if out is None else out.copy_(output.logits[0])
        if isinstance(ctx, ForwardContext) and ctx.vocabulary is not None:
            hide_added(logits, ctx.vocabulary, self.vocab_size)
        return logits

    @torch.inference_mode()
    def folded_logits(
        self,
        ids: Tensor,
        deltas: Mapping[str, Callable[[], Tensor]],
        biases: Mapping[str, Callable[[], Tensor]] | None = None,
        norms: Mapping[str, tuple[Tensor | None, Tensor | None]] | None = None,
        modules: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
        parallel: Collection[str] = (),
        rows: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
        num_token_ids: int = 0,
        precision: torch.dtype | None = None,
    ) -> Tensor:
        """The proof's half: ``ids`` int64 [T <= 64] -> float32 [T, vocab] with every linear at ``W + dW`` in fp32.

        ``deltas`` maps names of ``linears`` to functions that make the fp32 [out, in] difference; one exists at a time.
        ``biases``, ``norms``, ``modules``, ``parallel``, ``rows``, ``num_token_ids`` and ``precision``: as in
        ``FoldedContext``.
        """
        if not 1 <= len(ids) <= MAX_FOLDED_TOKENS:
            raise ValueError(f"{len(ids)} ids; folded mode takes 1 to {MAX_FOLDED_TOKENS}")
        biases, norms, modules, rows = biases or {}, norms or {}, modules or {}, rows or {}
        unknown = sorted({*deltas, *biases} - {*self._linears, *self._heads}) + sorted(set(norms) - set(self._norms))
        unknown += sorted(set(modules) - set(self.points))
        unknown += sorted(set(rows) - set(self._token_rows))
        if unknown:
            raise ValueError(f"the base has no linear {unknown[0]!r} to fold a delta into")
        ids = ids.to(self.device)
        regime = self.kv_regime(len(ids))
        ctx = FoldedContext(
            deltas=deltas,
            biases=biases,
            norms=norms,
            modules=modules,
            parallel=frozenset(parallel),
            rows=rows,
            num_token_ids=num_token_ids,
            kv_regimes=torch.full_like(ids, regime) if regime else None,
            precision=precision,
        )
        hidden = self._decode(ids, torch.arange(len(ids), device=self.device), ctx)
        if FINAL_HIDDEN in modules:
            hidden = hidden + modules[FINAL_HIDDEN](hidden)
        return self.logits(hidden, ctx)

    def prompt_kv(self, embeddings: Tensor, regime: int = 0) -> Tensor:
        """What attention caches of virtual tokens [p, hidden] alone: fp32 [num_layers, 2, kv_heads, p, head_dim]."""
        return prompt_kv(self, embeddings, regime)

    def decode_embeddings(self, embeddings: Tensor, ids: Tensor, positions: Tensor, ctx: PassContext) -> Tensor:
        """A pass over p virtual tokens [p, hidden] and then ``ids`` [T]: final hidden rows [p + T, hidden]."""
        with use(ctx):
            rows = self._model.get_input_embeddings()(ids[None])
            rows = torch.cat((embeddings[None].to(rows), rows), dim=1)
            output = self._decoder(inputs_embeds=rows, position_ids=positions[None], use_cache=False)
        return output.last_hidden_state[0]

    def _decode(self, ids: Tensor, positions: Tensor, ctx: PassContext) -> Tensor:
        with use(ctx):
            output = self._decoder(input_ids=ids[None], position_ids=positions[None], use_cache=False)
        return output.last_hidden_state[0]


def load_base(
    path: Path | str,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    load_format: str = "auto",
    allow_hub: bool = False,
    extra_names: Sequence[str] = (),
    cache_dir: Path | None = None,
) -> BaseModel:
    """Load a base from a local folder (or, with ``allow_hub``, a hub id).

    ``load_format`` "auto" reads safetensors, "dummy" fills the configuration with random weights. ``extra_names`` are
    the names it is served under, first of all names that adapters may call this base by. ``cache_dir`` keeps digests of
    weight files (default: in the user's cache). Raises ``UnsupportedBase`` naming the component that cannot be served,
    ``ConfigError`` for settings.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype} is not served; allowed: float32, bfloat16, float16")
    if load_format not in ("auto", "dummy"):
        raise ConfigError(f"load format {load_format!r} is unknown; allowed: auto, dummy")
    device = torch.device(device)
    if not allow_hub:
        # transformers looks files up on the hub in corners that no argument reaches.
        huggingface_hub.constants.HF_HUB_OFFLINE = True
    folder = checkpoint.locate(path, allow_hub=allow_hub)
    hub_id = () if Path(path).is_dir() else (str(path),)
    raw = checkpoint.read_raw_config(folder)
    config = checkpoint.read_config(folder, raw)
    longrope_limit = check_rope(config)
    weights = () if load_format == "dummy" else checkpoint.weight_files(folder)
    model = checkpoint.read_model(folder, config, dtype=dtype, device=device, load_format=load_format)
    max_context = checkpoint.max_context(config)
    probes = probe_sequences(config.vocab_size, max_context, device)
    references = reference_logits(model, probes)
    linears, norms, points, embedding, head, seen = _take_over(model, probes[0], longrope_limit)
    kv_heads, head_dim = _uniform(seen)
    spec = BaseSpec(
        fingerprint=identity.fingerprint(folder, raw, weights, cache_dir),
        names=tuple(dict.fromkeys([*extra_names, *hub_id, *identity.known_names(folder, raw)])),
        model_type=config.model_type,
        linears={name: _linear_spec(linear) for name, linear in linears.items()},
        norms={name: NormSpec(name, norm.size, norm.bias is not None) for name, norm in norms.items()},
        points=frozenset(points[1]),
        vocab_size=config.vocab_size,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        tied_embeddings=bool(config.tie_word_embeddings),
        num_tokens=identity.count_tokens(folder),
        embedding=None if embedding is None else embedding.spec,
        head=None if head is None else _linear_spec(head),
        kv_heads=kv_heads,
        head_dim=head_dim,
        registered=registered_linears(model),
    )
    base = BaseModel(
        model,
        linears,
        norms,
        points[0],
        spec,
        KVLayout(config.num_hidden_layers, kv_heads, head_dim, dtype),
        embedding=embedding,
        head=head,
        longrope_limit=longrope_limit,
        eos_token_ids=checkpoint.eos_token_ids(model, config),
        max_context=max_context,
        folder=folder,
    )
    verify(base, probes, references)
    return base


class _Taken(NamedTuple):
    """What is ours in a model that was taken over. ``points``: attach points of the tables, and those of the spec."""

    linears: dict[str, BaseLinear]
    norms: dict[str, TunableNorm]
    points: tuple[tuple[str, ...], tuple[str, ...]]
    embedding: TunableEmbedding | None
    head: BaseLinear | None
    seen: Trace


def _take_over(model: PreTrainedModel, probe: Tensor, longrope_limit: int | None) -> _Taken:
    """Trace the unmodified model, then put our linears, attention and rope in their places."""
    prefix, layers = find_layers(model, find_decoder(model), model.config.num_hidden_layers)
    entry: list[torch.Size] = []
    hook = layers[0].register_forward_pre_hook(lambda _, args: entry.extend(arg.shape for arg in args[:1]))
    with watch(model) as calls, count_calls(model) as embedding_calls:
        seen = trace(model, find_linears(prefix, layers), probe)
    hook.remove()
    norms = find_norms(model, calls, prefix, len(layers))
    linears = pack(model, prefix, len(layers), seen.groups())
    attentions = [name for name, module in model.named_modules() if module in seen.specs]
    size = model.config.hidden_size
    has_entry = entry == [torch.Size((1, len(probe), size))]
    points = find_points(linears, attentions, prefix, len(layers), size, has_entry=has_entry)
    head, wrapped = model.get_output_embeddings(), None
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module is head and type(module) is torch.nn.Linear:
            wrapped = wrap_head(model, name)
    for module, spec in seen.specs.items():
        attach_spec(module, spec)
    model.set_attn_implementation(ATTENTION_NAME)
    if longrope_limit is not None:
        choose_longrope_per_row(model, longrope_limit)
    widen_in_folded_mode(model)
    fuse(model)
    fuse_layers(model)
    make_tunable(norms.values())
    if has_entry:
        layers[0].register_forward_pre_hook(EmbedPoint(points[0].index(EMBED_OUT)))
    return _Taken(linears, norms, points, make_embedding_tunable(model, len(embedding_calls)), wrapped, seen)


def _uniform(seen: Trace) -> tuple[int, int]:
    layers = sorted(spec.layer for spec in seen.specs.values())
    if layers != list(range(len(layers))):
        raise UnsupportedBase(f"attention layers are numbered {layers}; layers without attention are not served")
    if len(seen.kv_shapes) != 1:
        shapes = ", ".join(f"{heads} x {size}" for heads, size in sorted(seen.kv_shapes))
        raise UnsupportedBase(f"layers have different KV heads ({shapes}); one shape for all layers is served")
    return next(iter(seen.kv_shapes))


def _linear_spec(linear: BaseLinear) -> LinearSpec:
    return LinearSpec(linear.name, linear.out_features, linear.in_features, linear.has_bias, linear.transposed)
