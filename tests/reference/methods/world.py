"""What a transcription reads: one optimizer step of responses, in float64."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

STUDENT, DATA, TEACHER = 1, 2, 3
ANYBODY = (STUDENT, DATA, TEACHER)


@dataclass(frozen=True)
class World:
    """B responses of up to T tokens over a vocabulary of V, with what is known of each token.

    Attributes:
        student: logits `[B, T, V]` under the weights being updated; carry the gradient. Index t
            scores the choice of `tokens[:, t]`.
        views: logits `[B, T, V]` of each teacher by name; `teacher`, `reference`, `teacher.NAME`.
        tokens: `[B, T]`, the token that was chosen.
        mask: `[B, T]`, True on open tokens: those a loss may look at.
        provenance: `[B, T]`, who chose the token: STUDENT, DATA or TEACHER on open tokens.
        sampler_logp: `[B, T]`, log-probability under the engine that generated.
        old_logp: `[B, T]`, log-probability under the trainer's weights at rollout time.
        student_top_ids: `[B, T, V]`, every token, likeliest first, by the student at rollout time.
        group: `[B]`, index of the prompt.
        verdict: `[B]`, the verifier's score in [0, 1]; NaN where the response was not judged.
        special: `[B, T]`, the chosen token is special, an end token excepted.
        values: `[B, T]`, a critic's value of the state in which the token was chosen.
        bootstrap_value: `[B]`, its value of the state after the last token.
        extra: further columns, `[B]` or `[B, T]`, by name.
        reduction: how rows are averaged.
    """

    student: Tensor
    views: Mapping[str, Tensor]
    tokens: Tensor
    mask: Tensor
    provenance: Tensor
    sampler_logp: Tensor
    old_logp: Tensor
    student_top_ids: Tensor
    group: Tensor
    verdict: Tensor
    special: Tensor
    values: Tensor
    bootstrap_value: Tensor
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    reduction: str = "token_mean"

    @property
    def teacher(self) -> Tensor:
        """Logits of the view called `teacher`."""
        return self.views["teacher"]

    def open_places(self, b: int) -> list[int]:
        """The open tokens of a response in order; what is not open takes no time."""
        return [t for t in range(self.mask.shape[1]) if bool(self.mask[b, t])]

    def places(self, kinds: tuple[int, ...] = ANYBODY) -> Iterator[tuple[int, int]]:
        """The open tokens of the step that somebody of `kinds` chose, by response, then place."""
        for b in range(self.mask.shape[0]):
            for t in self.open_places(b):
                if int(self.provenance[b, t]) in kinds:
                    yield b, t

    def sequences(self, kinds: tuple[int, ...] = ANYBODY) -> list[int]:
        """Responses with at least one such token."""
        return sorted({b for b, _ in self.places(kinds)})

    def log_student(self, b: int, t: int) -> Tensor:
        """The student's log-probabilities at one place, `[V]`, with gradient."""
        return self.student[b, t].log_softmax(-1)

    def log_view(self, b: int, t: int, view: str = "teacher") -> Tensor:
        """A view's log-probabilities at one place, `[V]`."""
        return self.views[view][b, t].log_softmax(-1)

    def log_ratio(self, b: int, t: int, view: str = "teacher") -> Tensor:
        """log view(token) - log student(token) at one place, detached."""
        token = int(self.tokens[b, t])
        return (self.log_view(b, t, view)[token] - self.log_student(b, t)[token]).detach()

    def average(
        self, losses: Mapping[tuple[int, int], Tensor], kinds: tuple[int, ...] = ANYBODY
    ) -> Tensor:
        """The reduction: a loss per place to one number.

        Denominators count all open tokens chosen by `kinds` (or the responses that hold one),
        whether or not `losses` names them: a closed gate changes no denominator.
        """
        rows = list(self.places(kinds))
        sequences = self.sequences(kinds)
        total = self.student.sum() * 0.0
        for b, t in rows:
            if (b, t) not in losses:
                continue
            own = sum(1 for row in rows if row[0] == b)
            factor = {
                "token_mean": 1.0 / len(rows),
                "sequence_mean": 1.0 / (len(sequences) * own),
                "sequence_sum": 1.0 / len(sequences),
            }[self.reduction]
            total = total + factor * losses[b, t]
        return total
