"""One visit to the response rows: project a chunk, evaluate it, differentiate it, drop it.

Everything that couples rows is settled before (`objective.signal`), so a chunk of rows has a loss
and a gradient of its own. The student's logits of a chunk are computed once; a block of its rows
at a time they are compared, and the gradient of that block's loss is written over them; then the
chunk is multiplied into the gradients of the hidden states and of the unembedding. That makes
three products with the student's unembedding and one with each view's, and memory for one chunk
of logits on each side, whatever the objective.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from opd.errors import ConfigError
from opd.formula import support
from opd.head import byproducts, fold, products
from opd.head.distribution import mapped, merge, merged_tokens, normalised
from opd.head.replies import check_reply
from opd.head.rows import BlockFields, likeliest
from opd.objective import SETTLED, Objective, token_field
from opd.terms import term_key
from opd.types import (
    Batch,
    Bound,
    FieldKey,
    TeacherScores,
    Unembedding,
    pack_rows,
    unanswered,
)

PRODUCT_TILE = 128
"""Rows that matrix products take at once."""

NAMED, RATIOS = "teacher.", "log_ratio/"
"""What views of further teachers are called, and the by-product that holds their log-ratios."""

HIDDEN = FieldKey("student_hidden")
GRADIENT_NORM = FieldKey("logit_gradient_norm")


@dataclass(frozen=True)
class Budget:
    """What a visit may hold at once, beside its operands and the gradients it returns.

    Attributes:
        chunk_bytes: logits of a chunk of rows, those of the student and of every view together.
        block_bytes: one tensor of a block's rows times the vocabulary. A formula that is
            differentiated holds some ten of these. Small ones stay in a CPU's cache.
    """

    chunk_bytes: int
    block_bytes: int


CPU_BUDGET = Budget(chunk_bytes=128 * 2**20, block_bytes=2 * 2**20)
CUDA_BUDGET = Budget(chunk_bytes=640 * 2**20, block_bytes=32 * 2**20)


def budget_on(device: torch.device) -> Budget:
    """The default budget: a CPU's cache is small, and a GPU wants large products."""
    return CPU_BUDGET if device.type == "cpu" else CUDA_BUDGET


@dataclass(frozen=True)
class Asked:
    """Whose gradients are asked for."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False

    @property
    def any(self) -> bool:
        """Whether the loss is differentiated at all."""
        return self.hidden or self.weight or self.bias


@dataclass
class Seen:
    """What a visit found, row by row, and the gradients it was asked for.

    Attributes:
        losses: per term, unreduced, as the objective returns them.
        factors: per term, what each row's loss is multiplied with before the sum.
        notes: per-row numbers for the metrics.
        rows: by-products.
        fields: what was wanted.
        depends: whether the loss depends on the student.
        hidden, weight, bias: gradients, in the dtype of the logits; None where not asked for.
    """

    losses: dict[str, Tensor] = field(default_factory=dict)
    factors: dict[str, Tensor] = field(default_factory=dict)
    notes: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    fields: dict[FieldKey, Tensor] = field(default_factory=dict)
    depends: bool = False
    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None

    def take(self, part: Seen, rows: slice, total: int) -> None:
        """Copy what a block found to its place among all rows.

        Into memory made at the first block: what stays between two blocks would otherwise lie in
        the holes that they free, and each block would need new ones.
        """
        for name in ("losses", "notes", "rows", "fields"):
            mine = getattr(self, name)
            for key, value in getattr(part, name).items():
                if key not in mine:
                    assert not rows.start, f"{key} is found in some blocks only"
                    shape = (total, *value.shape[1:])
                    mine[key] = scratch(shape, value.dtype, value.device)
                mine[key][rows] = value
        self.depends = self.depends or part.depends


def scratch(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory that is written before it is read."""
    return torch.empty(shape, dtype=dtype, device=device)


@torch.no_grad()
def visit(
    hidden: Float[Tensor, "N H"],
    unembedding: Unembedding,
    batch: Batch,
    objective: Objective | None,
    *,
    budget: Budget,
    wanted: frozenset[FieldKey] = frozenset(),
    temperature: float = 1.0,
    asked: Asked = Asked(),
) -> Seen:
    """Evaluate an objective, or just look up fields, on every response row; see the module."""
    if GRADIENT_NORM in wanted and objective is None:
        raise ConfigError(f"{GRADIENT_NORM.name} is of an objective's loss, and there is none")
    for name, view in batch.token.views.items():
        check_reply(name, view, rows=hidden.shape[0])
    chunks = _Chunks(hidden, unembedding, batch, objective, wanted, temperature, asked, budget)
    seen = chunks.walk()
    if not chunks.trust_held():
        seen = chunks.walk()
    chunks.hand_over(seen)
    return seen


class _Chunks:
    """Walks over the rows, chunk by chunk and block by block, and adds up the gradients."""

    def __init__(
        self,
        hidden: Tensor,
        unembedding: Unembedding,
        batch: Batch,
        objective: Objective | None,
        wanted: frozenset[FieldKey],
        temperature: float,
        asked: Asked,
        budget: Budget,
    ) -> None:
        self._hidden, self._unembedding = hidden, unembedding
        self._batch, self._objective = batch, objective
        self._wanted, self._temperature = wanted, temperature
        self._asked = asked if objective is not None else Asked()
        self._differentiates = self._asked.any or GRADIENT_NORM in wanted
        self._views = {name: _gathered(view) for name, view in batch.token.views.items()}
        self._packed: dict[str, Tensor] = {}
        self._dtype = products.wide_dtype(hidden)
        row_bytes = self._dtype.itemsize * unembedding.vocab_size
        chunk_bytes = row_bytes + sum(map(_logit_bytes, batch.token.views.values()))
        self._chunk_size = _aligned(max(1, budget.chunk_bytes // chunk_bytes))
        self._block_size = max(1, budget.block_bytes // row_bytes)
        self._buffers: dict[str, Tensor] = {}
        self._trusted: list[Tensor] = []
        self._looks_at_every_fold = False
        self.factors = objective.reduction_factors(batch) if objective is not None else {}
        self._leave_out_unanswered()
        self._allocate_gradients()

    def walk(self) -> Seen:
        """Visit all rows."""
        self._gradient_is_new = True
        total, seen = self._hidden.shape[0], Seen(factors=self.factors)
        for start in range(0, max(total, 1), self._chunk_size):
            chunk = slice(start, min(start + self._chunk_size, total))
            for rows, part in self._chunk(chunk):
                seen.take(part, rows, total)
        return seen

    def trust_held(self) -> bool:
        """Whether the folds that nobody looked at are finite; if not, another walk looks at each.

        To look before going on would let the device wait at every chunk. Folds are finite unless
        an entry has no mass, and then mostly in the first chunk already.
        """
        trusted, self._trusted = self._trusted, []
        if not trusted or bool(torch.stack(trusted).all()):
            return True
        self._looks_at_every_fold = True
        return False

    def hand_over(self, seen: Seen) -> None:
        """Give the gradients away."""
        seen.hidden, seen.weight, seen.bias = self._of_hidden, self._of_weight, self._of_bias

    # -- gradients ---------------------------------------------------------------------------

    def _allocate_gradients(self) -> None:
        def empty(operand: Tensor | None, wanted: bool) -> Tensor | None:
            if operand is None or not wanted:
                return None
            return scratch(tuple(operand.shape), self._dtype, operand.device)

        self._of_hidden = empty(self._hidden, self._asked.hidden)
        self._of_weight = empty(self._unembedding.weight, self._asked.weight)
        self._of_bias = empty(self._unembedding.bias, self._asked.bias)
        real = self._unembedding.vocab_size
        for gradient in (self._of_weight, self._of_bias):
            if gradient is not None:
                gradient[real:] = 0.0  # padding has no logit

    def _add_gradients(self, gradient: Float[Tensor, "n V"], rows: slice) -> None:
        """Multiply the gradient on a chunk's plain products into those of the operands.

        Args:
            gradient: in the dtype of the logits or, if nobody else reads it, of the products.
        """
        real, own = self._unembedding.vocab_size, self._hidden[rows]
        factor = gradient.to(products.operand_dtype(own, self._unembedding))
        if self._of_hidden is not None:
            products.hidden_gradient_into(self._of_hidden[rows], factor, self._unembedding)
        if self._of_weight is not None:
            products.add_weight_gradient(
                self._of_weight[:real], factor, own, first=self._gradient_is_new
            )
        if self._of_bias is not None:
            products.add_bias_gradient(self._of_bias[:real], gradient, first=self._gradient_is_new)
        self._gradient_is_new = False

    # -- chunks and blocks -------------------------------------------------------------------

    def _chunk(self, rows: slice) -> Iterator[tuple[slice, Seen]]:
        size = rows.stop - rows.start
        logits = self._buffer("student", self._hidden, self._unembedding)[:size]
        products.logits_into(logits, self._hidden[rows], self._unembedding)
        scores = {name: view.rows(rows) for name, view in self._views.items()}
        view_logits: dict[str, Tensor] = {}

        def logits_of(name: str) -> Tensor:
            """Of a view, projected when somebody first asks for them."""
            if name not in view_logits:
                view = scores[name]
                assert view.hidden is not None
                out = self._buffer(f"view {name}", view.hidden, view.unembeddings[0])[:size]
                if view.heads:
                    assert view.answered_by is not None
                    products.logits_by_head_into(out, view.hidden, view.heads, view.answered_by)
                else:
                    products.logits_into(out, view.hidden, view.unembeddings[0])
                view_logits[name] = out
            return view_logits[name]

        gradient = logits
        if (folded := self._folded(logits, rows, scores, logits_of)) is not None:
            gradient, seen = folded
            yield rows, seen
        else:
            yield from self._blocks(logits, rows, scores, logits_of)
        if self._asked.any:
            self._add_gradients(gradient, rows)

    def _blocks(
        self,
        logits: Float[Tensor, "n V"],
        rows: slice,
        scores: Mapping[str, TeacherScores],
        logits_of: Callable[[str], Tensor],
    ) -> Iterator[tuple[slice, Seen]]:
        """A chunk, a block of rows at a time."""
        size = len(logits)
        for start in range(0, max(size, 1), self._block_size):
            block = slice(start, min(start + self._block_size, size))
            own = {name: view.rows(block) for name, view in scores.items()}
            placed = slice(rows.start + block.start, rows.start + block.stop)
            yield placed, self._block(logits[block], placed, own, _OfBlock(logits_of, block))

    def _folded(
        self,
        logits: Float[Tensor, "n V"],
        rows: slice,
        scores: Mapping[str, TeacherScores],
        logits_of: Callable[[str], Tensor],
    ) -> tuple[Tensor, Seen] | None:
        """A chunk by the kernels of `opd.head.fold`: its gradient on the plain products, which
        lies where the logits lay, and what was found. None where they do not say all of it."""
        if "teacher" not in scores or not fold.serves(logits, scores["teacher"].hidden):
            return None
        if self._teacher_weight is None:
            return None
        look_up = fold.FoldedFields(
            fold.Fold.of(
                logits,
                logits_of("teacher"),
                temperature=self._temperature,
                teacher_weight=self._teacher_weight,
            ),
            lambda name: self._rollout(name, rows),
            scores["teacher"],
        )
        finite = look_up.is_finite()
        if rows.start and not self._looks_at_every_fold:
            self._trusted.append(finite)
        elif not bool(finite):
            self._looks_at_every_fold = True
            return None
        with torch.set_grad_enabled(self._differentiates):
            seen = self._evaluate(look_up, rows)
            total = self._total(seen, rows)
        seen.fields = {key: look_up(key).detach() for key in self._wanted - {GRADIENT_NORM}}
        gradient = logits
        if self._differentiates:
            written = look_up.write_gradient(total, self._folded_dtype)
            seen.depends = written is not None
            if written is None or written.dtype == logits.dtype:
                self._finish(None if written is None else logits, logits, rows, seen)
            else:
                gradient = self._without_overlooked(written, rows)
        return gradient, _per_row(seen, rows)

    def _block(
        self,
        logits: Float[Tensor, "b V"],
        rows: slice,
        scores: Mapping[str, TeacherScores],
        logits_of: Callable[[str], Tensor],
    ) -> Seen:
        """Evaluate a block of rows; where asked, write its gradient over its logits."""
        merge_ids = self._batch.merge_ids
        leaf = logits.detach().requires_grad_(self._differentiates)

        def project_view(name: str) -> Tensor:
            view = scores[name]
            known = view.log_probs
            whole = logits_of(name) if known is None else known.to(products.wide_dtype(known))
            if view.id_map is not None:
                whole = mapped(whole, view.id_map)
            if known is None:
                return normalised(whole, temperature=self._temperature, merge_ids=merge_ids)
            return merge(whole if view.id_map is None else whole.log_softmax(-1), merge_ids)

        with torch.set_grad_enabled(self._differentiates):
            log_probs = normalised(leaf, temperature=self._temperature, merge_ids=merge_ids)
            look_up = BlockFields(
                log_probs, lambda name: self._rollout(name, rows), scores, project_view, merge_ids
            )
            seen = self._evaluate(look_up, rows)
            self._note_replaced(look_up, seen)
            total = self._total(seen, rows)
        seen.fields = {
            key: self._field(look_up, key).detach() for key in self._wanted - {GRADIENT_NORM}
        }
        if self._differentiates:
            gradient = self._differentiate(total, leaf, look_up)
            seen.depends = gradient is not None
            self._finish(gradient, logits, rows, seen)
        return _per_row(seen, rows)

    def _finish(
        self, gradient: Float[Tensor, "b V"] | None, logits: Tensor, rows: slice, seen: Seen
    ) -> None:
        """Write the gradient on the plain products over the logits; None: there is none."""
        gradient = self._without_overlooked(logits.zero_() if gradient is None else gradient, rows)
        if GRADIENT_NORM in self._wanted:
            seen.fields[GRADIENT_NORM] = gradient.norm(dim=-1)
        plain = products.through_transformations(gradient, logits, self._unembedding)
        if plain is not logits:
            logits.copy_(plain)

    def _without_overlooked(
        self, gradient: Float[Tensor, "b V"], rows: slice
    ) -> Float[Tensor, "b V"]:
        """The gradient, set to zero on rows that are in no term."""
        if self._overlooked is not None:
            gradient.masked_fill_(self._overlooked[rows].unsqueeze(-1), 0.0)
        return gradient

    def _total(self, seen: Seen, rows: slice) -> Float[Tensor, ""]:
        return sum_terms([(seen.losses[name], self.factors[name][rows]) for name in seen.losses])

    def _differentiate(
        self, total: Tensor, leaf: Tensor, look_up: BlockFields
    ) -> Float[Tensor, "b V"] | None:
        """The gradient of a block's loss on its logits; None where it does not depend on them."""
        if not total.requires_grad:
            return None
        inputs = [leaf, *look_up.ledger.leaves]
        found = torch.autograd.grad(total, inputs, allow_unused=True)
        gradient = look_up.ledger.gradient(list(found[1:]))
        if gradient is not None and self._temperature != 1.0:
            gradient = gradient.div_(self._temperature)
        if gradient is None or found[0] is None:
            return found[0] if gradient is None else gradient
        return gradient.add_(found[0])

    def _evaluate(self, look_up: BlockFields | fold.FoldedFields, rows: slice) -> Seen:
        """Losses, notes and by-products of a block."""
        seen = Seen()
        if self._objective is None:
            return seen
        seen.losses = self._objective.row_losses(look_up, seen.notes, look_up.closed)
        for label, missing in self._unanswered.items():
            seen.losses[label] = seen.losses[label].masked_fill(missing[rows], 0.0)
        seen.rows = {f"loss/{label}": value for label, value in seen.losses.items()}
        seen.rows["student_logp"] = look_up(FieldKey("student_logp"))
        seen.rows["student_entropy"] = look_up(FieldKey("student_entropy"))
        for name, row in self._ratios.items():
            ratio = look_up.log_ratio(name)
            if ratio is not None:
                seen.rows[row] = ratio
        return seen

    def _note_replaced(self, look_up: BlockFields, seen: Seen) -> None:
        """Where smoothing gave an entry more than the view did, and supports without an entry."""
        for label, term in self._objective.parts() if self._objective is not None else ():
            if term.smoothing:
                seen.notes[f"changed/{label}/smoothing"] = look_up.share_at_floor(term)
            if Bound.of(term.support).function is support.intersection:
                ids = look_up(term_key(term, "support_ids"))
                seen.notes[f"empty/{label}/support"] = (ids < 0).all(-1).to(torch.float32)

    def _field(self, look_up: BlockFields, key: FieldKey) -> Tensor:
        """A wanted field; the student's top ids are those of now, k of them by the support."""
        if key.name == "student_top_ids" and key.support is not None:
            return likeliest(look_up.student_log_probs, int(dict(key.support.knobs)["k"]))[1]
        if key.name in byproducts.BY_PRODUCTS:
            value = byproducts.BY_PRODUCTS[key.name](look_up, key)
        else:
            value = look_up(key)
        return self._if_answered(look_up, key.view, value) if key.view else value

    def _if_answered(self, look_up: BlockFields, view: str, value: Tensor) -> Tensor:
        """NaN where a number says something of a view that has no answer."""
        missing = look_up.unanswered(view)
        if missing is None or not value.is_floating_point():
            return value
        shape = (-1, *(1 for _ in value.shape[1:]))
        return value.detach().masked_fill(missing.view(shape), math.nan)

    # -- operands ----------------------------------------------------------------------------

    def _buffer(self, name: str, hidden: Tensor, unembedding: Unembedding) -> Tensor:
        """Memory for the logits of a chunk, the same for every chunk."""
        if name not in self._buffers:
            size = min(self._chunk_size, self._hidden.shape[0])
            shape = (size, unembedding.vocab_size)
            dtype = products.wide_dtype(hidden)
            self._buffers[name] = scratch(shape, dtype, hidden.device)
        return self._buffers[name]

    def _rollout(self, name: str, rows: slice) -> Tensor:
        """What the rollout and the signal phase hold, packed to some rows."""
        token = self._batch.token
        if name == "special_ids":
            return token_field(token, name)
        if name == "student_top_ids":
            return token_field(token, name)[rows]
        if name == HIDDEN.name:
            return self._hidden[rows]
        if name not in self._packed:
            settled = name.startswith(SETTLED)
            whole = (
                token.coupled[name.removeprefix(SETTLED)] if settled else token_field(token, name)
            )
            packed = pack_rows(whole, token.mask)
            if name == "tokens":
                packed = merged_tokens(packed, self._batch.merge_ids)
            self._packed[name] = packed
        return self._packed[name][rows]

    @cached_property
    def _ratios(self) -> dict[str, str]:
        """By view, what the by-product is called that holds its log-ratio to the student."""
        views = self._batch.token.views
        named = [name for name in views if name.startswith(NAMED) and not views[name].parts]
        own = {"teacher": "log_ratio"} if "teacher" in views else {}
        return own | {name: RATIOS + name.removeprefix(NAMED) for name in named}

    @cached_property
    def _teacher_weight(self) -> float | None:
        """What the fold mixes with; None where it does not serve this visit."""
        if self._batch.merge_ids or self._unembedding.soft_cap is not None:
            return None
        return fold.fold_weight(
            self._objective,
            self._wanted - {GRADIENT_NORM},
            self._batch.token.views,
            self._unembedding.vocab_size,
        )

    @cached_property
    def _folded_dtype(self) -> torch.dtype:
        """What a fold writes its gradient in: what the products take, if nobody else reads it."""
        read = (
            GRADIENT_NORM in self._wanted
            or self._of_bias is not None
            or self._unembedding.logit_scale != 1.0
        )
        return self._dtype if read else products.operand_dtype(self._hidden, self._unembedding)

    def _leave_out_unanswered(self) -> None:
        """A row that a view does not answer is in no term against that view; some are in none."""
        self._overlooked: Tensor | None = None
        self._unanswered: dict[str, Tensor] = {}
        if self._objective is None:
            return
        for label, term in self._objective.labelled():
            missing = unanswered(self._batch.token.views, term.against)
            if missing is not None and self._objective.reads_its_view(term):
                self._unanswered[label] = missing
                self.factors[label] = self.factors[label].masked_fill(missing, 0.0)
        overlooked = torch.stack([factor == 0 for factor in self.factors.values()]).all(0)
        self._overlooked = overlooked if bool(overlooked.any()) else None


def _per_row(seen: Seen, rows: slice) -> Seen:
    """Everything detached, one number per row."""
    size = rows.stop - rows.start
    for values in (seen.losses, seen.notes, seen.rows):
        for key, value in values.items():
            values[key] = value.detach().expand(size) if value.dim() == 0 else value.detach()
    return seen


def _aligned(rows: int) -> int:
    """So many rows, or a few less: products of whole tiles are faster."""
    return rows - rows % PRODUCT_TILE if rows >= PRODUCT_TILE else rows


@dataclass(frozen=True)
class _OfBlock:
    """Logits of a chunk, cut to a block."""

    of_chunk: Callable[[str], Tensor]
    block: slice

    def __call__(self, name: str) -> Tensor:
        return self.of_chunk(name)[self.block]


def _gathered(scores: TeacherScores) -> TeacherScores:
    one = scores.unembedding
    return replace(
        scores,
        unembedding=None if one is None else products.gathered(one),
        heads=tuple(head and products.gathered(head) for head in scores.heads),
    )


def _logit_bytes(scores: TeacherScores) -> int:
    """What the logits of one row of a view take, where they are projected here."""
    if scores.log_probs is not None or scores.hidden is None or not scores.unembeddings:
        return 0
    return products.wide_dtype(scores.hidden).itemsize * scores.unembeddings[0].vocab_size


def sum_terms(parts: list[tuple[Tensor, Tensor]]) -> Float[Tensor, ""]:
    """Sum over terms and rows of loss times factor; rows of factor zero cannot spread a NaN."""
    if not parts:
        return torch.zeros(())
    total = parts[0][0].new_zeros(())
    for value, factor in parts:
        total = total + torch.where(factor == 0, 0.0, value * factor.to(value.dtype)).sum()
    return total
