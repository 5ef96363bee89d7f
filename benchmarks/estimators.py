"""What each estimator of the reverse KL descends, exactly, and how noisily: the bias table.

Every response of a small world is enumerated, in float64, through the library's own head. For each
estimator: the distance of its expected gradient from that of the sequence's reverse KL and from
that of the local one (prefixes held fixed), relative to their lengths, and its total variance for
one response. Worlds: a random tree whose responses end by themselves, and three chains.

    python benchmarks/estimators.py [--quick] [--json FILE] [--result FILE]

Variances depend on the world: a baseline that lowers one may raise another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from common import OURS, parse_args, write_json, write_result
from common import command_line as this_command
from opd import audit
from opd.audit import World
from opd.formula import credit, divergence, reward
from opd.objective import Dense, Objective, Sampled

LOG_RATIO = Sampled(reward=reward.teacher_log_ratio)


@dataclass(frozen=True)
class Estimator:
    """An objective and, where it reads one, whose values the critic says."""

    objective: Objective
    exact_critic: bool = False


def sampled(walk: object, baseline: object = None, *, exact_critic: bool = False) -> Estimator:
    term = Sampled(reward=reward.teacher_log_ratio, credit=walk, baseline=baseline)  # type: ignore[arg-type]
    return Estimator(Objective(term), exact_critic)


def discounted(gamma: float) -> object:
    return partial(credit.discounted, gamma=gamma, meaning="variance_heuristic")


def estimators() -> Mapping[str, Estimator]:
    """The rows of the table."""
    exact = Dense(divergence=divergence.reverse_kl)
    future = Sampled(reward=reward.expected_log_ratio, credit=credit.future)
    return {
        "dense reverse KL": Estimator(Objective(exact)),
        "immediate": sampled(credit.immediate),
        "immediate + D (vOPD)": sampled(credit.immediate, credit.expected_reward),
        "discounted 0.5": sampled(discounted(0.5)),
        "windowed 2": sampled(partial(credit.windowed, window=2)),
        "next step": sampled(credit.next_step),
        "return to go": sampled(credit.return_to_go),
        "return to go - V": sampled(credit.return_to_go, credit.value, exact_critic=True),
        "length-normalised": sampled(credit.length_normalised),
        "Rao-Blackwell": sampled(credit.rao_blackwell),
        "Rao-Blackwell - V": sampled(credit.rao_blackwell, credit.value, exact_critic=True),
        "damped future 0.5": sampled(partial(credit.damped_future, future_weight=0.5)),
        "dense + future": Estimator(Objective(exact, future)),
        "GAE 0.95, exact V": sampled(partial(credit.gae, gae_lambda=0.95), exact_critic=True),
        "GAE 0.95, V = 0": sampled(partial(credit.gae, gae_lambda=0.95)),
        "GAE 1, V = 0": sampled(partial(credit.gae, gae_lambda=1.0)),
    }


def worlds(quick: bool) -> Mapping[str, World]:
    """Where they are tried."""
    horizon = 4 if quick else 5
    return {
        "tree with an end": audit.random_tree(0, horizon=horizon, end_id=0),
        "fast chain": audit.fast_chain(0, horizon=horizon),
        "slow chain": audit.slow_chain(0, horizon=horizon),
        "absorbing chain": audit.absorbing_chain(0, horizon=horizon),
    }


def rows(quick: bool) -> Iterator[dict[str, object]]:
    for world_name, world in worlds(quick).items():
        sequence = audit.sequence_reverse_kl_gradient(world)
        local = audit.local_gradient(world, divergence.reverse_kl)
        value = audit.value(world)
        for name, estimator in estimators().items():
            critic = value if estimator.exact_critic else 0.0 * value
            found = audit.expectation(estimator.objective, world, critic=critic)
            yield {
                "case": world_name,
                "system": OURS,
                "estimator": name,
                "from_sequence": audit.compare(found.gradient, sequence).relative_error,
                "from_local": audit.compare(found.gradient, local).relative_error,
                "variance": found.variance,
            }


def main() -> None:
    options = parse_args("What each estimator of the reverse KL descends.")
    found = list(rows(options.quick))
    print(f"{'world':18}{'estimator':24}{'from sequence':>15}{'from local':>13}{'variance':>11}")
    for row in found:
        print(
            f"{row['case']:18}{row['estimator']:24}{row['from_sequence']:15.2g}"
            f"{row['from_local']:13.2g}{row['variance']:11.3g}"
        )
    if options.json:
        write_json(found, options.json)
    if options.result:
        write_result(options.result, found, this_command())


if __name__ == "__main__":
    main()
