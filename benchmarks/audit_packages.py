"""What the distillation losses of other packages descend, by `opd audit`.

Each package is run by a Python that has it; what cannot be imported is listed as not installed.

    python benchmarks/audit_packages.py [--package NAME] [--json FILE] [--result FILE]

`--result` replaces in FILE the packages that were run and leaves the others as they are, each with
the command, the versions and the machine of its own run.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from common import command_line, one_thread, parser, provenance, write_json
from opd.audit.adapters import adapt
from opd.audit.verdict import Verdict, audit_loss
from opd.errors import ConfigError
from opd.user_code import find_function

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Package:
    """A package whose losses are audited.

    Attributes:
        title: as people write it.
        module: what is imported.
        distribution: what its version is asked of.
        install: how to get this version.
        revision: of the source, where it is no installed distribution.
    """

    title: str
    module: str
    distribution: str
    install: str
    revision: str = ""

    @property
    def is_here(self) -> bool:
        return importlib.util.find_spec(self.module) is not None

    @property
    def version(self) -> str:
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return self.revision


PACKAGES = {
    "trl": Package("TRL", "trl", "trl", "pip install 'trl==1.16.0'"),
    "verl": Package("verl", "verl", "verl", "pip install 'verl==0.9.1' tensordict"),
    "torchrl": Package("torchrl", "torchrl", "torchrl", "pip install 'torchrl==0.14.1'"),
    "liger": Package("Liger", "liger_kernel", "liger-kernel", "pip install 'liger-kernel==0.8.5'"),
    "ms-swift": Package("ms-swift", "swift", "ms-swift", "pip install 'ms-swift==4.6.0'"),
    "nemo-rl": Package(
        "NeMo-RL",
        "nemo_rl",
        "nemo-rl",
        "source of https://github.com/NVIDIA-NeMo/RL at 7ea279ab on Python's path, beside ray, "
        "torchdata, hydra-core, pyzmq and nvidia-ml-py",
        "git 7ea279ab",
    ),
    "slime": Package(
        "slime",
        "slime",
        "slime",
        "source of https://github.com/THUDM/slime at 624b824a on Python's path",
        "git 624b824a",
    ),
    "tinker": Package("tinker", "tinker", "tinker", "pip install 'tinker==0.38.0'"),
}


@dataclass(frozen=True)
class Case:
    """A loss with its options.

    Attributes:
        package: of `PACKAGES`.
        target: `module:function`.
        called: what its package calls it, in a few words.
        claim: that as a claim; empty where it is no divergence.
        known: what its source says that it descends, in the words of the audit or the first of
            them; empty where that has no name.
        faults: that its source shows, and that the audit has to name.
        writer: who writes the tokens where it is used.
        note: what else a reader should know.
        refused: whether the package is known to refuse these options.
    """

    package: str
    target: str
    adapter: str
    called: str
    claim: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    known: str = ""
    faults: tuple[str, ...] = ()
    writer: Literal["student", "teacher"] = "student"
    note: str = ""
    refused: bool = False

    @property
    def command(self) -> str:
        """What reproduces it, from the repository's root."""
        words = ["opd", "audit", self.target]
        if self.adapter != "rows":
            words += ["--adapter", self.adapter]
        for name, value in self.options.items():
            words += ["--set", f"{name}={value}"]
        if self.claim:
            words += ["--claim", self.claim]
        if self.writer != "student":
            words += ["--written-by", self.writer]
        return shlex.join(words)


REVERSE, FORWARD = "reverse KL", "forward KL"
JSD = "generalised JSD with weight 0.5 on the teacher"
ANOTHER = ("another-divergence",)
OTHER_CLAIM = {REVERSE: "reverse_kl", FORWARD: "forward_kl", JSD: "jsd:0.5"}


def cases() -> Iterator[Case]:
    """Everything that is audited."""
    yield from _trl()
    yield from _verl()
    yield from _torchrl()
    yield from _liger()
    yield from _ms_swift()
    yield from _nemo_rl()
    yield from _slime()
    yield from _tinker()


BETAS = {0.0: FORWARD, 0.5: JSD, 1.0: REVERSE}


def _trl() -> Iterator[Case]:
    here = "trl.experimental"
    gkd = f"{here}.gkd.gkd_trainer:GKDTrainer.generalized_jsd_loss"
    for beta, what in BETAS.items():
        claim = OTHER_CLAIM[what]
        yield Case("trl", gkd, "trl", f"GKD, beta {beta:g}: {what}", claim, {"beta": beta}, what)
    chunked = "trl.kernels.chunked_divergence:ChunkedDivergenceFunction"
    for beta, what in BETAS.items():
        called = f"chunked divergence, beta {beta:g}: {what}"
        yield Case("trl", chunked, "trl_chunked", called, OTHER_CLAIM[what], {"beta": beta}, what)
    iw = f"{here}.iw_opd.iw_opd_trainer:IWOPDTrainer.generalized_jsd_loss"
    sparse = {"beta": 1.0, "top_k": 4}
    yield Case(
        "trl",
        iw,
        "trl",
        "IW-OPD's divergence, beta 1, top 4 with a tail: reverse KL",
        "reverse_kl",
        sparse,
        "reverse KL on the student's top 4, the rest in one bucket",
        ANOTHER,
    )
    yield Case(
        "trl",
        iw,
        "trl",
        "IW-OPD's divergence, beta 1, top 4 without a tail: reverse KL",
        "reverse_kl",
        {**sparse, "add_tail": False},
        "reverse KL on the student's top 4, both renormalised",
        ANOTHER,
    )
    sdpo = f"{here}.sdpo.loss_utils:compute"
    yield Case(
        "trl",
        f"{sdpo}_full_logit_self_distillation_loss",
        "pair",
        "SDPO, full logits, alpha 1: reverse KL",
        "reverse_kl",
        {"distillation_alpha": 1.0},
        REVERSE,
    )
    for tail, rest in ((True, "the rest in one bucket"), (False, "both renormalised")):
        yield Case(
            "trl",
            f"{sdpo}_topk_self_distillation_loss",
            "pair",
            f"SDPO, top 4 {'with' if tail else 'without'} a tail, alpha 1: reverse KL",
            "reverse_kl",
            {"distillation_topk": 4, "distillation_alpha": 1.0, "distillation_add_tail": tail},
            f"reverse KL on the student's top 4, {rest}",
            ANOTHER,
        )
    yield Case(
        "trl",
        f"{sdpo}_sampled_token_self_distillation_loss",
        "rows",
        "SDPO, sampled token: reverse KL",
        "reverse_kl",
        {"distillation_alpha": 1.0},
        REVERSE,
    )
    for gamma, known in ((0.0, REVERSE), (1.0, "")):
        yield Case(
            "trl",
            "benchmarks.peers.audit_trl:iw_opd",
            "reduced",
            f"IW-OPD, sampled token, gamma {gamma:g}: reverse KL",
            "reverse_kl",
            {"gamma": gamma},
            known,
            () if known else ANOTHER,
        )
    server = "benchmarks.peers.audit_trl:server"
    yield Case(
        "trl",
        server,
        "reduced",
        "served teacher, beta 1, sampled token and a tail: reverse KL",
        "reverse_kl",
        {"beta": 1.0},
        "reverse KL of two bins, the sampled token and the rest",
        ANOTHER,
    )
    yield Case(
        "trl",
        server,
        "reduced",
        "served teacher, beta 0, top 4 and a tail: forward KL",
        "forward_kl",
        {"beta": 0.0, "top_k": 4},
        "forward KL on the teacher's top 4, the rest in one bucket",
        ANOTHER,
    )


def _verl() -> Iterator[Case]:
    distilled = "verl.trainer.distillation.losses:distillation_loss"

    def distillation(
        called: str, known: str, faults: tuple[str, ...] = (), note: str = "", **options: Any
    ) -> Case:
        claim = "forward_kl" if called.endswith(FORWARD) else "reverse_kl"
        return Case("verl", distilled, "verl", called, claim, options, known, faults, note=note)

    backward: dict[str, tuple[str, tuple[str, ...]]] = {
        "kl": ("nothing", (*ANOTHER, "no-teacher-gradient")),
        "k2": (REVERSE, ()),
        "k3": (FORWARD, (*ANOTHER, "dead-rows")),
        "abs": ("total variation", ANOTHER),
    }
    shipped: dict[str, Any] = {"defaults": "yaml"}
    for mode, (known, faults) in backward.items():
        settings = {**shipped, "loss_mode": mode, "use_policy_gradient": False}
        yield distillation(f"{mode}, differentiated: reverse KL", known, faults, **settings)
    yield Case(
        "verl",
        distilled,
        "verl",
        "k1, differentiated: reverse KL",
        "reverse_kl",
        {**shipped, "loss_mode": "k1", "use_policy_gradient": False},
        refused=True,
    )
    rewarded: dict[str, tuple[str, tuple[str, ...]]] = {
        "k1": (REVERSE, ()),
        "k2": ("the k2 value as a penalty", ANOTHER),
        "k3": ("the k3 value as a penalty", ANOTHER),
        "abs": ("", ANOTHER),
    }
    for mode, (known, faults) in rewarded.items():
        called = f"{mode} as the reward of a policy gradient: reverse KL"
        settings = {**shipped, "loss_mode": mode, "use_policy_gradient": True}
        yield distillation(called, known, faults, **settings)
    called = "k1 as the reward, the defaults of the dataclass: reverse KL"
    yield distillation(called, REVERSE, ANOTHER, loss_mode="k1")
    called = "k3, differentiated, the clamps of the dataclass: forward KL"
    faults = (*ANOTHER, "dead-rows")
    yield distillation(called, FORWARD, faults, loss_mode="k3", use_policy_gradient=False)
    topk: dict[str, Any] = {"loss_mode": "forward_kl_topk", "use_policy_gradient": False}
    called = "forward KL on the top k, k the vocabulary, no clamps: forward KL"
    yield distillation(called, FORWARD, **shipped, **topk)
    called = "forward KL on the top k, k the vocabulary, the dataclass' clamps: forward KL"
    yield distillation(called, FORWARD, ANOTHER, **topk)
    called = "forward KL on the top 4, no clamps: forward KL"
    known = "forward KL on the teacher's top 4, the rest left out"
    faults = (*ANOTHER, "not-stationary", "dead-rows")
    yield distillation(
        called, known, faults, "a loss below 0 is raised to 0", **shipped, **topk, topk=4
    )
    called = "forward KL on the top k as the reward of a policy gradient: forward KL"
    faults = (*ANOTHER, "no-teacher-gradient")
    topk["use_policy_gradient"] = True
    yield distillation(called, "nothing", faults, "it prints a warning", **shipped, **topk)
    policies = ("vanilla", "gspo", "sapo", "gpg", "cispo", "clip_cov", "kl_cov", "dppo_tv")
    whole = "reverse KL of whole responses"
    for name in (*policies, "dppo_kl", "geo_mean"):
        what = whole if name == "geo_mean" else REVERSE
        yield Case(
            "verl",
            f"verl.trainer.ppo.core_algos:compute_policy_loss_{name}",
            "verl_policy",
            f"policy loss {name}, advantage log teacher - log student: {what}",
            "sequence_reverse_kl" if what == whole else "reverse_kl",
            {},
            what,
        )


def _torchrl() -> Iterator[Case]:
    here = "torchrl.objectives.llm"
    yield Case(
        "torchrl",
        f"{here}:k3_kl_token_estimate",
        "logp",
        "k3 of a token, the teacher's as the target: reverse KL",
        "reverse_kl",
        {"teacher_first": True},
        FORWARD,
        ANOTHER,
    )
    yield Case(
        "torchrl",
        f"{here}:DistillationLoss",
        "torchrl",
        "DistillationLoss, kl_direction reverse (default): reverse KL",
        "reverse_kl",
        {"kl_direction": "reverse"},
        FORWARD,
        ANOTHER,
        note="its documentation says so",
    )
    yield Case(
        "torchrl",
        f"{here}:DistillationLoss",
        "torchrl",
        "DistillationLoss, kl_direction forward, on the teacher's text: forward KL",
        "forward_kl",
        {"kl_direction": "forward"},
        FORWARD,
        writer="teacher",
    )
    yield Case(
        "torchrl",
        f"{here}:DistillationLoss",
        "torchrl",
        "DistillationLoss, kl_direction forward, on the student's text: forward KL",
        "forward_kl",
        {"kl_direction": "forward"},
        "alpha divergence, alpha -1",
        ANOTHER,
    )


def _liger() -> Iterator[Case]:
    jsd = "liger_kernel.chunked_loss:LigerFusedLinearJSDLoss"
    yield Case(
        "liger",
        jsd,
        "liger",
        f"JSD with its defaults: {JSD}",
        "jsd:0.5",
        {},
        JSD,
        ("hard-labels",),
    )
    pure = {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0}
    for beta, what in BETAS.items():
        yield Case(
            "liger",
            jsd,
            "liger",
            f"JSD alone, beta {beta:g}: {what}",
            OTHER_CLAIM[what],
            {**pure, "beta": beta},
            what,
            ("padding-has-mass",),
        )
    yield Case(
        "liger",
        "liger_kernel.chunked_loss:LigerFusedLinearCosineSimilarityLoss",
        "liger",
        "cosine similarity of logits alone",
        "",
        pure,
    )


def _ms_swift() -> Iterator[Case]:
    here = "swift.rlhf_trainers.gkd_loss"
    for beta, what in BETAS.items():
        called = f"jsd_loss, beta {beta:g}: {what}"
        yield Case(
            "ms-swift", f"{here}:jsd_loss", "pair", called, OTHER_CLAIM[what], {"beta": beta}, what
        )
    for beta, what in BETAS.items():
        yield Case(
            "ms-swift",
            f"{here}:gkd_loss",
            "ms_swift",
            f"gkd_loss, beta {beta:g}: {what}",
            OTHER_CLAIM[what],
            {"beta": beta},
            what,
            ("padding-copied",),
        )
    for beta, direction in ((0.0, FORWARD), (1.0, REVERSE)):
        yield Case(
            "ms-swift",
            f"{here}:gkd_loss",
            "ms_swift",
            f"gkd_loss, beta {beta:g}, the teacher's top 4: {direction}",
            OTHER_CLAIM[direction],
            {"beta": beta, "top_k": 4},
            f"{direction} on the teacher's top 4, both renormalised",
            ANOTHER,
        )


def _nemo_rl() -> Iterator[Case]:
    distilled = "benchmarks.peers.audit_nemo_rl:DistillationLossFn"
    for kind, what in (("forward", FORWARD), ("reverse", REVERSE)):
        yield Case(
            "nemo-rl",
            distilled,
            "nemo_rl",
            f"distillation, kl_type {kind}, k the vocabulary: {what}",
            OTHER_CLAIM[what],
            {"kl_type": kind},
            what,
        )
        yield Case(
            "nemo-rl",
            distilled,
            "nemo_rl",
            f"distillation, kl_type {kind}, top 4: {what}",
            OTHER_CLAIM[what],
            {"kl_type": kind, "top_k": 4, "zero_outside_topk": False},
            f"{what} on the teacher's top 4, both renormalised",
            ANOTHER,
        )
    yield Case(
        "nemo-rl",
        distilled,
        "nemo_rl",
        "distillation, kl_type reverse, top 4, zero_outside_topk: reverse KL",
        "reverse_kl",
        {"kl_type": "reverse", "top_k": 4, "zero_outside_topk": True},
        "",
        (*ANOTHER, "not-stationary"),
        note="tokens outside count as if the teacher gave them e^-100",
    )
    clipped = "benchmarks.peers.audit_nemo_rl:ClippedPGLossFn"
    for label, extra in (("clipped", {}), ("REINFORCE", {"disable_ppo_ratio": True})):
        yield Case(
            "nemo-rl",
            clipped,
            "nemo_rl",
            f"policy gradient, {label}, advantage log teacher - log student: reverse KL",
            "reverse_kl",
            {"reference_policy_kl_penalty": 0.0, **extra},
            REVERSE,
        )


def _slime() -> Iterator[Case]:
    here = "benchmarks.peers.audit_slime"
    yield Case(
        "slime",
        f"{here}:policy_loss_function",
        "slime",
        "its on-policy distillation, advantage log teacher - log student: reverse KL",
        "reverse_kl",
        {},
        REVERSE,
    )
    yield Case(
        "slime",
        f"{here}:custom_k2",
        "slime",
        "a user's k2, differentiated: reverse KL",
        "reverse_kl",
        {},
        REVERSE,
    )
    yield Case(
        "slime",
        f"{here}:custom_k3",
        "slime",
        "a user's k3, differentiated: reverse KL",
        "reverse_kl",
        {},
        FORWARD,
        ANOTHER,
    )


def _tinker() -> Iterator[Case]:
    here = "benchmarks.peers.audit_tinker"
    known = {"k1": "nothing", "k2": REVERSE, "k3": FORWARD}
    faults = {"k1": (*ANOTHER, "no-teacher-gradient"), "k2": (), "k3": ANOTHER}
    for name, what in known.items():
        yield Case(
            "tinker",
            f"{here}:{name}",
            "tinker",
            f"a user's {name}, differentiated: reverse KL",
            "reverse_kl",
            {"mask": "weights"},
            what,
            faults[name],
        )
    yield Case(
        "tinker",
        f"{here}:importance_sampling",
        "tinker",
        "a user's importance-weighted policy gradient: reverse KL",
        "reverse_kl",
        {"mask": "weights"},
        REVERSE,
    )
    yield Case(
        "tinker",
        f"{here}:full_reverse_kl",
        "tinker",
        "a user's reverse KL over the whole vocabulary: reverse KL",
        "reverse_kl",
        {"mask": "weights", "dense": True},
        REVERSE,
    )


# --------------------------------------------------------------------------------------------
# Running


def audited(case: Case) -> dict[str, Any]:
    """One row: the case, and the verdict or why there is none."""
    row: dict[str, Any] = {
        "package": case.package,
        "target": case.target,
        "called": case.called,
        "options": dict(case.options),
        "claim": case.claim,
        "writer": case.writer,
        "command": case.command,
        "note": case.note,
        "known": {"descends": case.known, "faults": list(case.faults)},
    }
    try:
        function = find_function(case.target, ROOT)
        loss = adapt(function, case.target, case.adapter, **case.options)
        verdict = audit_loss(loss, claim=case.claim or None, writer=case.writer)
    except Exception as error:  # other people's code may raise anything
        said = str(error).strip().splitlines() or [""]
        status = f"{type(error).__name__}: {said[0]}"
        return {**row, "status": status, "agrees": case.refused}
    named = {found.name for found in verdict.faults}
    agrees = verdict.descends.startswith(case.known) and set(case.faults) <= named
    return {**row, "status": "audited", "agrees": agrees, **_told(verdict)}


def _told(verdict: Verdict) -> dict[str, Any]:
    return {
        "descends": verdict.descends,
        "cosine": _rounded(verdict.match.cosine) if verdict.match else None,
        "claimed_cosine": _rounded(verdict.cosines.get(verdict.claim)),
        "holds": verdict.holds,
        "findings": [
            {
                "level": "fault" if found.is_fault else "caution",
                "name": found.name,
                "message": found.message,
            }
            for found in verdict.findings
        ],
        "seconds": round(verdict.seconds, 2),
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None or value != value else round(value, 4)


def run(names: list[str]) -> dict[str, dict[str, Any]]:
    """Audit all cases of the packages; of one that is not here, only that it is not."""
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        package = PACKAGES[name]
        if not package.is_here:
            print(f"{name}: not installed")
            continue
        print(f"{name} {package.version}")
        rows = []
        for case in cases():
            if case.package == name:
                rows.append(audited(case))
                print(_line(rows[-1]))
        about = provenance(command_line())
        found[name] = {"version": package.version, "install": package.install, **about}
        found[name]["rows"] = rows
    return found


def _line(row: dict[str, Any]) -> str:
    if row["status"] != "audited":
        return f"  {row['called']}\n    {row['status']}"
    said = {None: "", True: " holds", False: " does not hold"}[row["holds"]]
    cosine = "" if row["cosine"] is None else f" ({row['cosine']:.3f})"
    named = ", ".join(f"{found['level']} {found['name']}" for found in row["findings"])
    if not row["agrees"]:
        named += "; NOT WHAT IS KNOWN"
    return f"  {row['called']}\n    descends {row['descends']}{cosine};{said} [{named}]"


def merge(path: Path, found: dict[str, dict[str, Any]]) -> None:
    """Put what was run in its place in a file with all packages."""
    known = json.loads(path.read_text(encoding="utf-8"))["packages"] if path.exists() else {}
    known |= found
    packages = {name: known[name] for name in PACKAGES if name in known}
    path.write_text(json.dumps({"packages": packages}, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    arguments = parser("What the distillation losses of other packages descend.")
    arguments.add_argument("--package", choices=sorted(PACKAGES), help="only this one")
    options = arguments.parse_args()
    one_thread()
    found = run([options.package] if options.package else list(PACKAGES))
    if options.package and not found:
        raise ConfigError(f"{options.package} cannot be imported by {sys.executable}")
    if options.json:
        write_json([row for package in found.values() for row in package["rows"]], options.json)
    if options.result:
        merge(options.result, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
