"""Write `docs/methods.md` and `docs/atlas.md`, the lists of published methods, from the code.

python docs/make_method_pages.py
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

from opd import catalog
from opd.methods.make_index import method_rows

DOCS = Path(__file__).parent

TOKENIZERS = "not here: needs a bridge between tokenizers"
NO_SUM = "not here: not a sum over rows, see [what does not fit](what_does_not_fit.md)"

ROWS: tuple[tuple[str, str], ...] = (
    ("GKD", "gkd"),
    ("MiniLLM", "minillm token_and_exact_opd"),
    ("DistiLLM", "distillm distillm_reverse"),
    ("DistiLLM-2", "distillm_2"),
    ("SKD", "speculative_kd"),
    ("TML / Tinker OPD", "sampled_token_opd"),
    ("slime OPD", "slime_opd"),
    ("Teacher-topK LSM", "top_k_opd high_entropy_opd"),
    ("SG-TopK", "stop_gradient_top_k"),
    ("thunlp OPD", "candidates_opd"),
    ("vOPD", "vopd"),
    ("ResOPD", "res_opd"),
    ("PowerOPD", "power_opd clipped_opd tanh_opd"),
    ("OPD+", "opd_plus jsd_opd"),
    ("REOPOLD", "reopold"),
    ("TRPD", "trpd"),
    ("KETCHUP", "windowed_opd"),
    ("γ-credit", "bounded_return_opd"),
    ("GAE-OPD", "gae_opd"),
    ("CR-OPD", "cr_opd"),
    ("TV-OPD", "tv_opd squared_tv_opd"),
    ("TIDE", "tide"),
    ("AOPD", "aopd"),
    ("RouteOPD", NO_SUM),
    ("TrOPD", "tropd"),
    ("TRB", "blended_opd"),
    ("EOPD", "eopd"),
    ("Veto", "veto"),
    ("G-OPD / ExOPD", "exopd"),
    ("Direct-OPD", "direct_opd"),
    ("W2S-OPD", "w2s_opd"),
    ("CompassOPD", "compass_opd"),
    ("HPD", "hpd"),
    ("StableOPD", "stable_opd gold_and_reference"),
    ("IW-OPD", "iw_opd first_share_opd"),
    ("Prefix / TOPD / ESR", "prefix_opd growing_prefix_opd"),
    ("Prune-OPD", "prune_opd"),
    ("TIP", "tip tip_soft_or confident_wrong_opd"),
    ("TA-OPD", "ta_opd"),
    ("IER-OPD", "ier_opd"),
    ("SuRe-K2", "sure_opd"),
    ("FiRe", "fire_opd"),
    ("ReNIO", "renio"),
    ("Uni-OPD", "uni_opd"),
    ("TRD", "trd"),
    ("Relay-OPD", "relay_opd"),
    ("Lightning", "lightning_opd"),
    ("KDRL", "kdrl"),
    ("MiMo MOPD", "mimo_mopd"),
    ("SCOPE", "scope"),
    ("OPDVR", "opdvr"),
    ("R²-OPD", "r2_opd"),
    ("GC-OPD", "gc_opd"),
    ("RLSD", "rlsd"),
    ("RLRT", "rlrt"),
    ("Distilled RL", "distilled_rl"),
    ("RLAD", "rlad"),
    ("RLCSD", "rlcsd"),
    ("SDPG", "sdpg"),
    ("OPSD", "opsd"),
    ("SDPO", "sdpo sdpo_sampled"),
    ("OPCD", "opcd"),
    ("AR-OPD", "ar_opd"),
    ("AntiSD", "anti_sd"),
    ("DeepSeek-V4", "deepseek_v4"),
    ("GLM-5", "sampled_token_opd"),
    ("Nemotron MOPD", "nemotron_mopd"),
    ("GOLD", TOKENIZERS),
    ("BPM", TOKENIZERS),
    ("GAD", NO_SUM),
    ("ROPD", NO_SUM),
    ("OPRD", NO_SUM),
    ("DiffusionOPD", "not here: continuous actions"),
)
"""The published methods by name, and what stands for each."""

DISAGREEMENTS: tuple[tuple[str, str], ...] = (
    (
        "Which direction is called forward?",
        "Nothing here is called by a number. `reverse_kl` is student first, `forward_kl` teacher first; finite differences hold them to it.",
    ),
    ("REOPOLD's floor", "`reopold(floor_nats=...)`: -0.85 as most quote it, -1.72 as others do."),
    (
        "Early or late tokens?",
        "`iw_opd` and `first_share_opd` for another teacher, `pw_opsd` for a privileged self.",
    ),
    (
        "Which entropy gate?",
        "`high_entropy_opd`, `reopold` keep undecided students; `confident_wrong_opd` the decided; `eopd` adds where the teacher is undecided, `egrsd` damps there.",
    ),
    (
        "What of correct responses?",
        "Imitated (`sampled_token_opd`), reinforced (`scope`), reinforced against the teacher (`rlrt`), made concise (`compaction_opsd`).",
    ),
    (
        "With the verifier or before it?",
        "`kdrl`, `sdpg` join; `atod` moves from one to the other; `grpo` after any run is the sequence.",
    ),
    (
        "Whose top k, and what of the rest?",
        "Student's: `candidates_opd`, `opcd`, `sdft`; teacher's: `top_k_opd`, `tide`, `eopd`; both: `ta_opd`. Renormalised, raw or with a bucket is `tail`, always said.",
    ),
    ("TIP's score", "The code's product is `tip`, the paper's soft or `tip_soft_or`."),
    (
        "R2-OPD's statistics",
        "By response as the paper has them, `r2_opd`; by step, the outcome `sigmoid_gate`.",
    ),
    (
        "Does the size of a log-ratio say anything?",
        "`tv_opd` keeps the sign alone, `compressed_opd`, `clipped_opd`, `tanh_opd` and `power_opd` some of the size, `sampled_token_opd` all.",
    ),
    (
        "KL by samples: k1, k2 or k3?",
        "`sampled_token_opd` is k1 as a reward, `sure_opd` and `kdrl` differentiate k2, `k3_opd` k3, `skill_sd` k3 with its ratio.",
    ),
    (
        "Is a bigger teacher better? Is dense better?",
        "Questions for experiments: `suppress_unlikely`, `sft`, `offpolicy_kd`, `grpo` and `teacher_is_student` are their controls.",
    ),
)

INTRO = """\
# Published methods

<!-- Written by docs/make_method_pages.py; edit that. -->

Each is one function of `opd.methods` with one `return`, and a recipe that runs:
`opd run recipes/methods/NAME.toml`. `opd explain NAME` prints its equation, its nine variables and what it
needs; `opd diff NAME NAME` where two differ; [the atlas](atlas.md) shows all choices on one page.

**{count} methods, {distinct} different compositions.** The column *formula* says where the equation was taken
from: `code` (the authors', or a public implementation under its name), `paper`, `note` (others' notes on the paper
or its code) or `inferred` (symbols of ours for a description in words); {read} are from code or paper. *Evidence*: {levels}.
A paper's claim is not a measurement of this project: what is measured here is marked M. Settings are those of the
source; where it is silent, the docstring says so.

{table}

## By published name

The methods that literature up to October 2026 names most, and those that stand for them here. Where several do,
the literature has several forms.

{rows}

## What frameworks call on-policy distillation

[A page of its own](frameworks.md) has the defaults of eleven frameworks, each as a run file, with what its gradient
descends.

## Where the literature disagrees

{disagreements}
"""

FAMILIES = {
    "controls": "Controls",
    "dense": "A divergence to the teacher, differentiated",
    "sampled": "The sampled token, scored",
    "returns": "Credit along the response",
    "switching": "Some tokens one way, others another",
    "targets": "Combined teachers and anchors",
    "outcomes": "A verifier beside the teacher",
    "guided": "A verifier beside a self that is told more",
    "privileged": "A self that is told more",
}

ATLAS = """\
# Atlas

<!-- Written by docs/make_method_pages.py; edit that. -->

Every published method and what it chose for each of the survey's nine variables ([what they are](variables.md)).
A dot is the commonest choice:

{defaults}

`opd list methods --variable gate` sorts by one column, `opd diff NAME NAME` compares two rows.
"""


def main() -> None:
    """Write both pages."""
    rows = method_rows()
    (DOCS / "methods.md").write_text(methods_page(rows), encoding="utf-8")
    (DOCS / "atlas.md").write_text(atlas_page(rows), encoding="utf-8")


def methods_page(rows: list[dict[str, object]]) -> str:
    """The list of methods with their sources."""
    known = catalog.methods()
    lines = ["| method | what it computes | source | formula | evidence |", "|---|---|---|---|---|"]
    for row in rows:
        entry = known[str(row["name"])]
        lines.append(
            f"| `{row['name']}` | {_cell(entry.summary)} | {_cell(_papers(entry))} "
            f"| {row['formula_source']} | {row['evidence']} |"
        )
    levels = Counter(str(row["evidence"]) for row in rows)
    names = {
        "E0": "paper or report",
        "E1": "framework",
        "E2": "official blog",
        "E3": "hypothesis of the survey",
        "M": "measured here",
    }
    said = ", ".join(
        f"{level} {names[level]} ({levels[level]})" for level in names if levels[level]
    )
    matrix = ["| published as | here |", "|---|---|"]
    for name, here in ROWS:
        matrix.append(f"| {name} | {here if here.startswith('not here') else _names(here)} |")
    return INTRO.format(
        count=len(rows),
        distinct=len({row["composition_hash"] for row in rows}),
        read=sum(row["formula_source"] in ("code", "paper") for row in rows),
        levels=said,
        table="\n".join(lines),
        rows="\n".join(matrix),
        disagreements="\n".join(f"- **{what}** {how}" for what, how in DISAGREEMENTS),
    )


def atlas_page(rows: list[dict[str, object]]) -> str:
    """Methods against variables, by family."""
    known = catalog.methods()
    index = {str(row["name"]): json.loads(json.dumps(row["variables"])) for row in rows}
    variables = list(next(iter(index.values())))
    common = {
        variable: Counter(choices[variable] for choices in index.values()).most_common(1)[0][0]
        for variable in variables
    }
    page = ATLAS.format(
        defaults="\n".join(f"- *{variable}*: {common[variable]}" for variable in variables)
    )
    for family, title in FAMILIES.items():
        page += f"\n## {title}\n\n"
        page += (
            "| method | " + " | ".join(variables) + " |\n" + "|---" * (len(variables) + 1) + "|\n"
        )
        for name, choices in index.items():
            if known[name].module.rpartition(".")[2] != family:
                continue
            cells = ("·" if choices[v] == common[v] else _cell(choices[v]) for v in variables)
            page += f"| `{name}` | " + " | ".join(cells) + " |\n"
    return page


def _papers(entry: catalog.Entry) -> str:
    """The identifiers in a source, or its words where there are none."""
    source = entry.section("Source")
    found = re.findall(r"arXiv:\d{4}\.\d{4,5}|doi:[^ ,;]*[^ ,;.]", source)
    return ", ".join(dict.fromkeys(found)) or source.rstrip(".")


def _names(words: str) -> str:
    return ", ".join(f"`{word}`" for word in words.split())


def _cell(text: str) -> str:
    """Text that stays in its cell."""
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    main()
