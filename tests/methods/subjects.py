"""Every published method with small knobs, and the transcription it is held to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor

from opd import methods
from opd.objective import Method
from tests.builders import DATA, STUDENT, TEACHER
from tests.reference.methods import (
    estimators,
    frameworks,
    outcomes,
    privileged,
    targets,
    weighting,
)
from tests.reference.methods.world import World


@dataclass(frozen=True)
class Subject:
    """A method, who writes its text, and its transcription.

    Attributes:
        make: the method with the knobs of the test.
        transcription: of a world to its loss.
        writers: who wrote the responses, in turn.
        renamed: what the transcription calls a view of ours.
        gradient_only: the two losses differ by what carries no gradient.
    """

    make: Callable[[], Method]
    transcription: Callable[[World], Tensor]
    writers: tuple[int, ...] = (STUDENT,)
    renamed: Mapping[str, str] = field(default_factory=dict)
    gradient_only: bool = False


def _of(
    name: str,
    knobs: Mapping[str, Any],
    transcription: Callable[..., Tensor],
    theirs: Mapping[str, Any] | None = None,
    writers: tuple[int, ...] = (STUDENT,),
    **renamed: str,
) -> Subject:
    make = partial(getattr(methods, name), **knobs)
    same = {key: value for key, value in knobs.items() if key != "context"}
    told = same if theirs is None else theirs
    return Subject(make, partial(transcription, **told), writers, renamed)


BOTH = (STUDENT, DATA)
WITH_TEACHER = (STUDENT, TEACHER)
K = {"k": 3}

SUBJECTS: dict[str, Subject] = {
    # foundations, dense
    "forward_kl_opd": _of("forward_kl_opd", {}, targets.forward_kl_opd),
    "distillm": _of("distillm", {"skew": 0.2}, estimators.distillm, writers=BOTH),
    "distillm_reverse": _of(
        "distillm_reverse", {"skew": 0.2}, estimators.distillm_reverse, writers=BOTH
    ),
    "distillm_2": _of(
        "distillm_2",
        {"skew": 0.2, "student_coef": 1.3},
        estimators.distillm_2,
        {"teacher_coef": 0.7, "student_coef": 1.3, "skew": 0.2},
        WITH_TEACHER,
    ),
    "speculative_kd": _of("speculative_kd", {}, estimators.speculative_kd, writers=WITH_TEACHER),
    "forward_top_k_opd": _of("forward_top_k_opd", K, targets.forward_top_k_opd),
    "stop_gradient_top_k": _of("stop_gradient_top_k", K, estimators.stop_gradient_top_k),
    "candidates_opd": _of("candidates_opd", K, estimators.thunlp_opd_published),
    "blended_opd": _of("blended_opd", {"k": 3, "blend": 0.2}, targets.blended_opd, K),
    "acceptance_opd": _of("acceptance_opd", {}, targets.acceptance_opd),
    "sure_opd": _of("sure_opd", {"boost": 0.7}, estimators.sure_opd),
    "hpd": _of("hpd", {}, targets.hpd, writers=(DATA,)),
    "high_entropy_opd": _of("high_entropy_opd", {"share": 0.3}, weighting.high_entropy_opd),
    "gold_and_reference": _of(
        "gold_and_reference",
        {"gold_coef": 0.3, "reference_coef": 0.2},
        targets.stable_opd,
        {"gold_coef": 0.3, "reference_coef": 0.2, "exact": True},
        BOTH,
    ),
    "dagger": _of("dagger", {}, targets.dagger, writers=BOTH),
    # sampled
    "res_opd": _of("res_opd", K, estimators.res_opd),
    "power_opd": _of("power_opd", {"power": 1.5}, estimators.power_opd),
    "opd_plus": _of("opd_plus", {"alpha": 0.4}, estimators.opd_plus),
    "reopold": _of(
        "reopold",
        {"floor_nats": -0.6, "share": 0.4, "low": 0.1, "high": 0.2},
        estimators.reopold,
    ),
    "trpd": _of("trpd", {"teacher_share": 0.3}, estimators.trpd),
    "tv_opd": _of("tv_opd", {"scale": 0.7}, estimators.tv_opd_published),
    "squared_tv_opd": _of("squared_tv_opd", {}, estimators.tv_opd),
    "compressed_opd": _of("compressed_opd", {}, estimators.compressed_opd),
    "clipped_opd": _of("clipped_opd", {"low": -1.0, "high": 0.5}, estimators.clipped_opd),
    "gndpo": _of("gndpo", {"within_nats": 1.0}, estimators.gndpo_published, {"bound": 1.0}),
    "iw_opd": _of("iw_opd", {"boost": 0.8}, weighting.iw_opd),
    "first_share_opd": _of("first_share_opd", {"share": 0.5}, weighting.first_share_opd),
    "prune_opd": _of(
        "prune_opd",
        {"k": 3, "at_least": 0.7, "drop": 0.3, "base": 0.1},
        weighting.prune_opd,
    ),
    "ta_opd": _of("ta_opd", {"k": 3, "share": 0.3}, weighting.ta_opd),
    "ier_opd": _of("ier_opd", {"k": 2, "share": 0.3}, weighting.ier_opd),
    "slime_opd": _of(
        "slime_opd",
        {"outcome_scale": 1.0, "low": 0.1, "high": 0.15},
        estimators.slime_opd,
        {"teacher_coef": 1.0, "low": 0.1, "high": 0.15},
    ),
    "nemotron_mopd": _of("nemotron_mopd", {"low": 0.8, "high": 1.3}, outcomes.nemotron_mopd),
    "lightning_opd": _of("lightning_opd", {}, weighting.lightning_opd, writers=(DATA,)),
    "relay_opd": _of("relay_opd", {}, weighting.relay_opd, writers=WITH_TEACHER),
    # returns
    "minillm": _of(
        "minillm",
        {"cap": 1.1, "data_coef": 0.4},
        estimators.minillm,
        {"cap": 1.1, "pretraining_coef": 0.4},
        BOTH,
    ),
    "token_and_exact_opd": _of("token_and_exact_opd", {}, estimators.minillm_trl),
    "windowed_opd": _of("windowed_opd", {"window": 3}, estimators.ketchup),
    "bounded_return_opd": _of(
        "bounded_return_opd",
        {"gamma": 0.8},
        estimators.reward_compatible_credit_published,
    ),
    "gae_opd": _of("gae_opd", {"gae_lambda": 0.7}, estimators.gae_opd),
    # switching and selecting
    "tide": _of(
        "tide",
        {"k": 3, "excess_share": 0.4, "deficit_share": 0.3, "deficit_coef": 0.7},
        targets.tide,
    ),
    "aopd": _of("aopd", K, targets.aopd),
    "eopd": _of(
        "eopd",
        {"k": 3, "nats": 1.2, "forward_coef": 0.6, "low": 0.1, "high": 0.2},
        targets.eopd,
    ),
    "tropd": _of(
        "tropd",
        {"k": 3, "guidance_coef": 0.3, "teacher_prefix": 2},
        targets.tropd,
        {"k": 3, "guidance_coef": 0.3, "expected": True},
        WITH_TEACHER,
    ),
    "tip": _of(
        "tip",
        {"share": 0.4, "entropy_power": 0.7, "divergence_power": 1.5},
        weighting.tip,
    ),
    "tip_soft_or": _of("tip_soft_or", {"share": 0.4}, weighting.tip_soft_or),
    "confident_wrong_opd": _of(
        "confident_wrong_opd",
        {"below_nats": 1.3, "above": 0.3},
        weighting.confident_wrong_opd,
    ),
    "prefix_opd": _of("prefix_opd", {"tokens": 3}, weighting.prefix_opd),
    "growing_prefix_opd": _of("growing_prefix_opd", {}, privileged.opsdc),
    "paced": _of(
        "paced",
        {"pass_power": 1.5, "fail_power": 0.5, "forward_coef": 0.3, "reverse_coef": 0.7},
        weighting.paced,
        {"a": 1.5, "b": 0.5, "reverse_share": 0.7},
    ),
    "renio": _of(
        "renio",
        {
            "at_least": 0.3,
            "ratio_cap": 1.5,
            "temperature": 0.7,
            "weight_cap": 1.4,
            "teacher_weight": 0.3,
        },
        weighting.renio,
        {"threshold": 0.3, "ratio_cap": 1.5, "temperature": 0.7, "cap": 1.4, "beta": 0.3},
    ),
    "trd": _of("trd", {}, weighting.trd, writers=(TEACHER,)),
    # targets
    "veto": _of("veto", {"share": 0.4}, targets.veto),
    "deepseek_v4": _of(
        "deepseek_v4",
        {"teachers": ("first", "second"), "weights": (0.3, 0.9)},
        targets.deepseek_v4,
        {"weights": {"teacher.first": 0.3, "teacher.second": 0.9}},
    ),
    "exopd": _of(
        "exopd",
        {"extrapolation": 1.4, "cap": 1.2},
        targets.exopd,
        reference="teacher.base",
    ),
    "direct_opd": _of("direct_opd", {"k": 3, "reference_coef": 0.4}, targets.direct_opd),
    "w2s_opd": _of("w2s_opd", {"k": 3, "gain": 0.7}, targets.w2s_opd),
    "compass_opd": _of("compass_opd", {"penalty": 0.6}, targets.compass_opd),
    "sr_opsd": _of(
        "sr_opsd", {"share": 0.8, "order": 0.7}, targets.sr_opsd, {"share": 0.8, "alpha": 0.7}
    ),
    "ar_opd": _of("ar_opd", {"gain": 0.7}, targets.ar_opd, {"gain": 0.7, "clip": 1e9}),
    "stable_opd": _of(
        "stable_opd",
        {"gold_coef": 0.3, "reference_coef": 0.2, "low": 0.1, "high": 0.15},
        targets.stable_opd,
        writers=BOTH,
    ),
    "tgpo": _of(
        "tgpo",
        {"label_coef": 0.6, "reference_coef": 0.2, "low": 0.1, "high": 0.15},
        targets.tgpo,
    ),
    "ts_opsd": _of("ts_opsd", {"temperature": 1.7}, targets.ts_opsd),
    "edge_opd": _of("edge_opd", {"reference_coef": 0.2}, weighting.edge_opd),
    "erpd": _of("erpd", {"reference_coef": 0.3}, privileged.erpd),
    # frameworks and the survey
    "k3_opd": _of("k3_opd", {}, frameworks.k3_opd),
    "raw_forward_top_k_opd": _of("raw_forward_top_k_opd", K, frameworks.raw_forward_top_k_opd),
    "both_ways_top_k_opd": _of("both_ways_top_k_opd", K, frameworks.both_ways_top_k_opd),
    "jsd_opd": _of("jsd_opd", {"teacher_weight": 0.3}, frameworks.jsd_opd),
    "tanh_opd": _of("tanh_opd", {"scale": 0.8}, frameworks.tanh_opd),
    "rao_blackwell_opd": _of("rao_blackwell_opd", {}, frameworks.rao_blackwell_opd),
    "sod": _of(
        "sod",
        {"gain_cap": 0.4, "outcome_scale": 0.7, "low": 0.1, "high": 0.15},
        frameworks.sod,
    ),
    "cr_opd": _of(
        "cr_opd",
        {"teacher_k": 4, "student_k": 4},
        frameworks.cr_opd,
    ),
    "teacher_is_student": _of("teacher_is_student", {}, frameworks.teacher_is_student),
    # outcomes
    "grpo": _of("grpo", {"low": 0.1, "high": 0.15}, weighting.grpo),
    "suppress_unlikely": _of("suppress_unlikely", {"share": 0.3}, weighting.suppress_unlikely),
    "kdrl": _of("kdrl", {"kl_coef": 0.2, "low": 0.1, "high": 0.15}, outcomes.kdrl),
    "mimo_mopd": _of(
        "mimo_mopd", {"outcome_scale": 0.7, "low": 0.8, "high": 1.3}, outcomes.mimo_mopd
    ),
    "atod": _of("atod", {"share": 0.3, "low": 0.1, "high": 0.15}, outcomes.atod),
    "opdvr": _of("opdvr", {}, outcomes.opdvr),
    "r2_opd": _of("r2_opd", {"sharpness": 0.8}, outcomes.r2_opd),
    "sg_opd": _of("sg_opd", {"agreeing": 1.3, "other": 0.7}, outcomes.sg_opd, {"beta": 0.3}),
    "ra_opd": _of("ra_opd", {}, outcomes.ra_opd),
    "gc_opd": _of(
        "gc_opd",
        {"scale": 0.7, "limit": 1.5, "low": 0.1, "high": 0.15},
        outcomes.gc_opd,
        {"scale": 0.7, "cap": 1.5, "low": 0.1, "high": 0.15},
    ),
    "uni_opd": _of(
        "uni_opd",
        {"margin": 0.4, "correct_share": 0.5},
        weighting.uni_opd,
        {"margin": 0.4, "direction": "both"},
    ),
    "scope": _of("scope", {"temperature": 0.8}, outcomes.scope),
    "distilled_rl": _of(
        "distilled_rl",
        {"cap": 1.8, "low": 0.1, "high": 0.15},
        outcomes.distilled_rl,
        {"clip": 1.8, "clip_low": 0.1, "clip_high": 0.15},
    ),
    "rlad": _of("rlad", {"old_share": 0.7, "low": 0.3, "high": 0.4}, outcomes.rlad),
    "verify_first": _of(
        "verify_first", {"at_least": 0.7, "low": 0.1, "high": 0.15}, outcomes.verify_first
    ),
    "rescue_opd": _of(
        "rescue_opd",
        {"teacher_coef": 0.4, "low": 0.1, "high": 0.15},
        outcomes.rescue_opd,
        {"coef": 0.4, "low": 0.1, "high": 0.15},
    ),
    "luffy": _of("luffy", {"half_at": 0.2}, outcomes.luffy, {"shape": 0.2}, WITH_TEACHER),
    "fire_opd": _of(
        "fire_opd",
        {"drop_share": 0.3, "teacher_gain": 0.7, "student_gain": 1.3, "low": 0.1, "high": 0.2},
        weighting.fire_opd,
        {
            "drop_share": 0.3,
            "teacher_gain": 0.7,
            "entropy_gain": 1.3,
            "low": 0.1,
            "high": 0.2,
        },
    ),
    "rlsd": _of(
        "rlsd",
        {"width": 0.3, "strength": 0.6, "low": 0.1, "high": 0.15},
        outcomes.rlsd,
        {"low": 0.3, "high": 0.3, "strength": 0.6, "clip_low": 0.1, "clip_high": 0.15},
    ),
    "rlrt": _of(
        "rlrt",
        {"width": 0.4, "strength": 0.7, "low": 0.1, "high": 0.15},
        outcomes.rlrt,
        {"epsilon": 0.4, "strength": 0.7, "clip_low": 0.1, "clip_high": 0.15},
    ),
    "rlcsd": _of(
        "rlcsd",
        {"temperature": 0.8, "scale": 0.6, "at_least": 0.1, "low": 0.1, "high": 0.15},
        outcomes.rlcsd,
        {"temperature": 0.8, "scale": 0.6, "threshold": 0.1, "low": 0.1, "high": 0.15},
    ),
    "cepo": _of(
        "cepo",
        {"width": 0.4, "strength": 0.6, "low": 0.1, "high": 0.15},
        privileged.cepo,
        {"width": 0.4, "mix": 0.6, "low": 0.1, "high": 0.15},
    ),
    "sdpg": _of(
        "sdpg",
        {"teacher_coef": 0.3, "reference_coef": 0.2, "low": 0.1, "high": 0.15},
        outcomes.sdpg,
    ),
    "srpo": _of(
        "srpo",
        {"k": 3, "sharpness": 0.8, "cap": 1.2, "low": 0.1, "high": 0.15},
        outcomes.srpo,
        {"k": 3, "entropy_scale": 0.8, "ratio_cap": 1.2, "low": 0.1, "high": 0.15},
    ),
    "hdpo": _of(
        "hdpo",
        {"coef": 0.6, "low": 0.1, "high": 0.15},
        outcomes.hdpo,
        {"coef": 0.6, "on": "own", "low": 0.1, "high": 0.15},
    ),
    "sdar": replace(  # the teacher's own log-probability is a part of the published value
        _of("sdar", {"sharpness": 1.5, "coef": 0.3, "low": 0.1, "high": 0.15}, outcomes.sdar),
        gradient_only=True,
    ),
    "egrsd": _of(
        "egrsd",
        {"nats": 1.2, "least": 0.3, "width": 0.4, "low": 0.1, "high": 0.15},
        weighting.egrsd,
        {
            "nats": 1.2,
            "floor": 0.3,
            "low": 0.4,
            "high": 0.4,
            "ratio_low": 0.1,
            "ratio_high": 0.15,
        },
    ),
    "anti_sd": _of(
        "anti_sd",
        {"scale": 0.7, "low": 0.1, "high": 0.15},
        privileged.anti_sd,
        {"coef": 0.7, "low": 0.1, "high": 0.15},
    ),
    "skill_sd": _of("skill_sd", {"coef": 0.3, "low": 0.1, "high": 0.15}, privileged.skill_sd),
    "trace": _of(
        "trace",
        {"forward_coef": 0.6, "reverse_coef": 0.4, "low": 0.1, "high": 0.15},
        weighting.trace,
    ),
    # privileged selves
    "opsd": _of("opsd", {"cap": 0.05}, privileged.opsd, {"clip": 0.05}),
    "pw_opsd": _of(
        "pw_opsd",
        {"least": 0.3, "centre": 0.4, "width": 0.2, "cap": 0.07},
        weighting.pw_opsd,
    ),
    "paint": _of(
        "paint",
        {"share": 0.4, "cap": 0.05},
        privileged.paint,
        {"share": 0.4, "clip": 0.05, "only": True, "mix": 0.0},
    ),
    "sdft": _of("sdft", {"k": 3, "cap": 1.2}, privileged.sdft, {"k": 3, "ratio_cap": 1.2}),
    "sdft_full": _of(
        "sdft_full", {"skip": 2}, privileged.sdft_full, {"skip": 2, "engine_cap": None}
    ),
    "sdpo": _of(
        "sdpo",
        {"k": 3, "cap": 1.2, "engine_cap": 1.1},
        privileged.sdpo,
        {"k": 3, "ratio_cap": 1.2, "engine_cap": 1.1},
    ),
    "sdpo_sampled": _of("sdpo_sampled", {"cap": 1.2}, privileged.sdpo_sampled, {"ratio_cap": 1.2}),
    "opcd": _of("opcd", K, privileged.opcd),
    "opsdc": _of("opsdc", {}, privileged.opsdc),
    "compaction_opsd": _of("compaction_opsd", {}, privileged.compaction_opsd),
    "ssopd": _of(
        "ssopd",
        {"coef": 0.6, "cap": 0.05, "low": 0.1, "high": 0.15},
        privileged.ssopd,
        {"coef": 0.6, "cap": 0.05, "every_failure": True, "low": 0.1, "high": 0.15},
    ),
    "context_distillation": _of(
        "context_distillation", {}, privileged.context_distillation, writers=(TEACHER,)
    ),
    "gates": _of(
        "gates",
        {"on_coef": 0.3, "off_coef": 0.8, "within_nats": 0.9},
        privileged.gates,
        {"on": 0.3, "off": 0.8, "cap": 0.9},
        WITH_TEACHER,
    ),
    "purified_opsd": _of(
        "purified_opsd", {"temperature": 1.3}, privileged.purified_opsd, {"beta": 1.3, "clip": 1e9}
    ),
    "ogls_sd": _of("ogls_sd", {"strength": 0.7, "window": 3}, privileged.ogls_sd),
}
