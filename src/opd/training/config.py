"""The run file: what a user can choose, with units, defaults and early errors. Imports no torch."""

from __future__ import annotations

import copy
import dataclasses
import datetime
import difflib
import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from opd.errors import ConfigError, nearest

STRICT = ConfigDict(extra="forbid")

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]
# What a generator of PyTorch takes, with room for what is added to a seed.
Seed = Annotated[int, Field(ge=-(2**62), le=2**62)]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, config=STRICT)
class LoraConfig:
    """A low-rank adapter in place of full training; needs the extra `lora`.

    Attributes:
        r: rank; 0 trains all weights.
        alpha: scale of the adapter; its product is multiplied with alpha / r.
        target_modules: names of the layers that get one; empty: every linear layer.
        merge: write merged weights at the end; otherwise the adapter alone.
    """

    r: NonNegative = 0
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 32.0
    target_modules: tuple[str, ...] = ()
    merge: bool = True


@dataclass(frozen=True, config=STRICT)
class StudentConfig:
    """The model that is trained.

    Attributes:
        model: a folder, a Hugging Face id, or `builtin:sort-student`.
        dtype: of the weights in memory; float32 is the safe choice for training.
        save_dtype: of the weights in the run's model folder; `auto` is that in memory.
        revision: of a Hugging Face id.
        trust_remote_code: run code that comes with the model.
        allow_pickle: load weights that are not safetensors.
    """

    model: str
    dtype: Dtype = "float32"
    save_dtype: Dtype = "auto"
    revision: str = ""
    trust_remote_code: bool = False
    allow_pickle: bool = False
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass(frozen=True, config=STRICT)
class ClientConfig:
    """How a teacher at a `url` is asked.

    Attributes:
        timeout_s: most seconds for one try of a request.
        retry_s: seconds during which a request is tried again after its first failure.
        concurrency: requests in flight at once.
        tokens_per_request: most tokens of one request; a longer sequence is one of its own.
        compress: have replies compressed, which needs the extra `serve`.
    """

    timeout_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 120.0
    retry_s: Rate = 300.0
    concurrency: Positive = 8
    tokens_per_request: Positive = 65536
    compress: bool = False


@dataclass(frozen=True, config=STRICT)
class CacheConfig:
    """Answers of a teacher that are kept on disk, so that each is asked for once.

    Attributes:
        folder: where they are; several runs may share it. Empty: none are kept.
        max_bytes: of the folder; beyond it the files that nobody used for longest go. 0: no bound.
        drift_share: of the answers found, the part that the teacher is asked for again.
        drift_limit: by how many nats a log-probability may differ then, before the run stops.
        offline: ask nobody, load no weights; stop where an answer is missing.
        revision: name of the teacher's weights among the answers, where its server does not tell,
            or where answers of several are there and it is offline.
    """

    folder: str = ""
    max_bytes: NonNegative = 0
    drift_share: Share = 0.01
    drift_limit: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.5
    offline: bool = False
    revision: Annotated[str, Field(max_length=200)] = ""


@dataclass(frozen=True, config=STRICT)
class TeacherConfig:
    """The model that scores. Fields as in `[student]`; empty `model` and `url`: there is none.

    Attributes:
        dtype: `auto` is float32 on a CPU, where half precision is slower, and as stored elsewhere.
        max_tokens: padded tokens per forward of the teacher; 0 chooses, as in `[train]`.
        url: of a server that scores, instead of a `model` loaded here.
        protocol: which the server speaks: `opd` (that of `opd serve`), `vllm` (its completions),
            `vllm-generate`, `sglang`, `hosted-echo` and `hosted-echo-ids` (hosted completions that
            echo a prompt with log-probabilities, by text or by id), `hosted` (those that do not).
        served_name: what the server calls the model, where its protocol asks.
        key_env: environment variable that holds the server's key; empty: none is sent.
        reply: what a server returns where the objective compares distributions: `hidden` states,
            or log-probabilities of the `entries` that are compared; `auto` takes the fewer bytes.
        local_copy: the served model in a folder here; `opd check --live` compares the two.
        route: of `[teacher]`, in place of a model: which of the `[teachers]` scores the view
            `teacher`, sequence by sequence: a data column that holds a name among them, or
            `module:function`, called with the prompt, that returns one.
        keep: where a model's weights are between its turns: `device`; `host` memory, from which
            they are brought for each turn; or `disk`, from which they are loaded anew. Models that
            are not kept on the device are there one at a time.
        conflict_every: of `[teacher]`, with several teachers that teach: steps between two
            measurements of how far they disagree; 0: never. One costs a pass of every teacher over
            the rows of the step, and as many gradients of the objective as there are teachers.
        client: how patient and how greedy the client is.
        cache: whether its answers are kept, and where.
    """

    model: str = ""
    dtype: Dtype = "auto"
    revision: str = ""
    trust_remote_code: bool = False
    allow_pickle: bool = False
    max_tokens: NonNegative = 0
    url: str = ""
    protocol: Literal[
        "opd", "vllm", "vllm-generate", "sglang", "hosted", "hosted-echo", "hosted-echo-ids"
    ] = "opd"
    served_name: str = ""
    key_env: str = ""
    reply: Literal["auto", "hidden", "entries"] = "auto"
    local_copy: str = ""
    route: str = ""
    keep: Literal["device", "host", "disk"] = "device"
    conflict_every: NonNegative = 50
    client: ClientConfig = field(default_factory=ClientConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)


SERVED_ALONE = ("protocol", "served_name", "key_env", "reply", "local_copy")
LOADED_ALONE = ("dtype", "revision", "keep")
"""Keys of a teacher's table that say something only where it is asked at a url, or loaded here; a
local copy is loaded too."""

OTHER_TEACHER = "teacher."
"""What the views of further teachers are called: `teacher.NAME` is scored by `[teachers.NAME]`."""


@dataclass(frozen=True, config=STRICT)
class DataConfig:
    """Where prompts come from, and what a good response is.

    Attributes:
        prompts: a .jsonl or .parquet file, a `datasets` folder or hub id, or `task:NAME`.
        validation: a source of its own for held-out prompts; empty: split off from `prompts`.
        test: a source of its own for the final figures; empty: the task's own test split, or
            the validation prompts.
        held_out: prompts split off for validation where `validation` is empty.
        prompt_column, answer_column, response_column, messages_column: names of the columns.
        max_prompt_tokens: limit on a prompt, special tokens included.
        bad_prompts: what to do with longer and with empty prompts; skipped ones are counted.
        dataset_split, dataset_subset: of a `datasets` folder or hub id.
        as_chat: put a plain prompt into one user message, so that the chat template applies.
        verifier: `auto` (the task's own, else `exact` where there are answers, else none),
            `none`, `task`, `exact`, `math-verify`, or `module:function`.
        chat_template_kwargs: passed to the tokenizer's chat template.
    """

    prompts: str
    validation: str = ""
    test: str = ""
    held_out: NonNegative = 256
    prompt_column: str = "prompt"
    answer_column: str = "answer"
    response_column: str = "response"
    messages_column: str = "messages"
    max_prompt_tokens: Positive = 4096
    bad_prompts: Literal["skip", "error"] = "skip"
    dataset_split: str = "train"
    dataset_subset: str = ""
    as_chat: bool = False
    verifier: str = "auto"
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, config=STRICT)
class SamplerConfig:
    """How rollouts are sampled. Settings that make the sampler differ from the student are
    recorded in every event.

    Attributes:
        max_new_tokens: limit on a response, in tokens; for a built-in task 64 if not given.
        temperature: divides the logits; 0 is greedy.
        top_p: keep the smallest set of tokens with this mass; 1 keeps all.
        top_k: keep that many tokens; 0 keeps all.
        stop: strings that end a response.
        samples_per_prompt: responses per prompt.
        max_sequences: sequences decoded at once.
    """

    max_new_tokens: Positive = 512
    temperature: Rate = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: NonNegative = 0
    stop: tuple[Text, ...] = ()
    samples_per_prompt: Positive = 1
    max_sequences: Positive = 256


@dataclass(frozen=True, config=STRICT)
class MethodConfig:
    """Which method, or a composition of your own.

    Attributes:
        name: a method of `opd list methods`, or `custom` with `objective`.
        options: the method's own knobs.
        objective: terms of a custom objective.
        states: for a custom objective, who writes the text: shares `student`, `data`, `teacher` and
            `replay`, and how the student's share is written: `replay_steps`, `horizon`,
            `teacher_prefix`, `mixture`, `interleave`, `rewrite`.
        views: for a custom objective, a table for every distribution it compares with that is not
            simply the teacher (or, called `reference`, the student at step 0): its `name`, its
            `source` (`teacher`, `initial_student`, `student`, `ema_student` with `decay`,
            `combination` with `parts`), and the `context` it reads in place of the prompt, with
            `context_role` and `chat_template_kwargs` of its own.
        merge_stop_ids: compare all end tokens as one action, their mass summed.
    """

    name: str = "reverse_kl_opd"
    options: dict[str, Any] = field(default_factory=dict)
    objective: dict[str, Any] = field(default_factory=dict)
    states: dict[str, Any] = field(default_factory=dict)
    views: tuple[dict[str, Any], ...] = ()
    merge_stop_ids: bool = False


@dataclass(frozen=True, config=STRICT)
class OptimizerConfig:
    """AdamW with warm-up, decay and clipping.

    Attributes:
        learning_rate: the peak.
        lr_warmup_steps: steps of linear warm-up from 0.
        decay: shape of the way from the peak to `final_share` of it at the last step.
        final_share: of the peak, at the last step.
        betas, eps: of AdamW.
        weight_decay: of AdamW; not applied to vectors.
        clip_norm: gradients are scaled down to this global norm; 0 never.
    """

    learning_rate: Rate = 1e-6
    lr_warmup_steps: NonNegative = 5
    decay: Literal["constant", "linear", "cosine"] = "linear"
    final_share: Share = 0.05
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-8
    weight_decay: Rate = 0.0
    clip_norm: Rate = 1.0


@dataclass(frozen=True, config=STRICT)
class TrainConfig(OptimizerConfig):
    """The distillation phase.

    Attributes:
        steps: rollout batches.
        prompts_per_step: prompts in a rollout batch.
        updates_per_rollout: optimizer steps on each rollout batch.
        max_tokens: padded tokens per micro-batch; bounds the memory, never the result. 0 chooses:
            2,048 on a CPU, whose cache then holds what a layer works on, 16,384 elsewhere.
        anchor: how strongly every optimizer step pulls the weights back to those at the start of
            the phase, as a share of the distance per unit of learning rate; 0: not at all.
        save_every: steps between checkpoints; 0: at the end only.
        keep: newest checkpoints kept besides the best.
    """

    steps: NonNegative = 200
    prompts_per_step: Positive = 64
    updates_per_rollout: Positive = 1
    max_tokens: NonNegative = 0
    anchor: Rate = 0.0
    save_every: NonNegative = 50
    keep: Positive = 2


@dataclass(frozen=True, config=STRICT)
class WarmupConfig(OptimizerConfig):
    """A supervised phase before distillation: the first remedy for a real mismatch.

    Attributes:
        steps: optimizer steps; 0 leaves the phase out.
        source: text to imitate: responses of the data set, or sampled from the teacher.
        prompts_per_step: sequences in a batch.
        learning_rate: that of [train] if not given.
    """

    steps: NonNegative = 0
    source: Literal["data", "teacher"] = "data"
    prompts_per_step: Positive = 64
    learning_rate: Rate = 1e-5
    lr_warmup_steps: NonNegative = 20
    decay: Literal["constant", "linear", "cosine"] = "constant"


@dataclass(frozen=True, config=STRICT)
class CriticConfig:
    """The learned value that GAE-OPD reads; unused unless the objective reads values.

    Attributes:
        hidden_units: units of the head's one hidden layer; 0 makes it linear.
        learning_rate: of the critic's own optimizer.
        updates_per_step: updates of the critic after each rollout batch.
        rows_per_update: most rows of one update, drawn without replacement.
        warmup_steps: first steps, in which only the critic learns.
        replay_steps: recent rollout batches that are taught again; 0 for none.
        clip_nats: furthest a value may move within a step and still be taught; 0: no limit.
    """

    hidden_units: NonNegative = 0
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-3
    updates_per_step: Positive = 4
    rows_per_update: Positive = 8192
    warmup_steps: NonNegative = 0
    replay_steps: NonNegative = 0
    clip_nats: Rate = 0.0


@dataclass(frozen=True, config=STRICT)
class EvaluateConfig:
    """What is measured on held-out prompts, and when.

    Attributes:
        every: steps between validations; 0: at start and end only.
        prompts: validation prompts.
        test_prompts: test prompts for the figures at start and end.
        teacher: measure the teacher too.
        privileged: at start and end measure the student also where it reads what a view with a
            `context` reads, on the test prompts. Not with what only a rollout tells.
        sets: further named sets, each a source as in `data.prompts`.
    """

    every: NonNegative = 50
    prompts: Positive = 256
    test_prompts: Positive = 1000
    teacher: bool = True
    privileged: bool = False
    sets: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, config=STRICT)
class LogConfig:
    """Records besides the run folder's own.

    Attributes:
        trackers: any of tensorboard, wandb, trackio; each needs its extra.
        samples_per_step: responses written to samples.jsonl per step.
        token_share: share of the responses whose tokens are written to tokens/, for `opd query`;
            0: none, 1: all.
    """

    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    samples_per_step: NonNegative = 2
    token_share: Share = 0.1


@dataclass(frozen=True, config=STRICT)
class MonitorConfig:
    """What a run watches of itself, and what an alarm does.

    Attributes:
        on: measure the monitors of every step; false: neither monitors nor alarms.
        every: steps between two looks at whole distributions of student and teacher; 0: never.
        responses: of a step that a look is at, at most.
        on_alarm: `log` tells of it, `stop` ends the run after a checkpoint, `act` does what `act`
            says.
        act: with `on_alarm = "act"`, by alarm what it does: `log`, `stop`, or `lower_rate`, which
            halves the learning rate for the rest of the phase, once. Those that are not named log.
        off: alarms that are not given, by their names in `opd list alarms`.
        golden: sets of `evaluate.sets` that the student must not unlearn: measured at every
            evaluation, and watched by the alarm `golden_regression`.
    """

    on: bool = True
    every: NonNegative = 5
    responses: Positive = 8
    on_alarm: Literal["log", "stop", "act"] = "log"
    act: dict[str, Literal["log", "stop", "lower_rate"]] = field(default_factory=dict)
    off: tuple[str, ...] = ()
    golden: tuple[str, ...] = ()


@dataclass(frozen=True, config=STRICT)
class CheckConfig:
    """What `opd check` need not ask about again.

    Attributes:
        declared: composition rules that this run breaks on purpose: names of `opd list rules` whose
            level is `must be declared`.
    """

    declared: tuple[str, ...] = ()


@dataclass(frozen=True, config=STRICT)
class RunConfig:
    """A whole run.

    Attributes:
        teachers: further models by name, each with the keys of `[teacher]`: `[teachers.before]`
            scores the method's view of that name, or is what `teacher.route` goes to. A teacher's
            view without a table of its own is scored by `[teacher]`.
        name: of the run folder; empty: the source of the prompts and the next free number.
        output: folder that holds run folders; a relative one starts where the command is given.
        seed: of everything random.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        threads: CPU threads; 0 leaves the choice to PyTorch. With 1, equal settings give
            bit-identical weights.
    """

    student: StudentConfig
    data: DataConfig
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    teachers: dict[str, TeacherConfig] = field(default_factory=dict)
    method: MethodConfig = field(default_factory=MethodConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    log: LogConfig = field(default_factory=LogConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    check: CheckConfig = field(default_factory=CheckConfig)
    name: str = ""
    output: str = "runs"
    seed: Seed = 0
    device: str = "auto"
    threads: NonNegative = 0


@dataclasses.dataclass(frozen=True)
class Run:
    """A checked run file and the folder its relative paths start from."""

    config: RunConfig
    base: Path
    source: str = "<python>"

    def path(self, text: str) -> str:
        """A path of the run file as seen from here: relative ones start at the file's folder."""
        candidate = self.base / text
        return str(candidate) if candidate.exists() else text


DEFAULT_FILE = Path(__file__).parent.parent / "assets" / "sort.toml"


def load(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Run:
    """Read and check a run file; without one, the embedded default.

    Args:
        path: a TOML file, or a run folder.
        overrides: `--section.key`, value, ... as on the command line.

    Raises:
        ConfigError: names the key or value, the nearest valid one, and the file.
    """
    if path is None:
        file, base = DEFAULT_FILE, Path.cwd()
    else:
        file = Path(path)
        if file.is_dir():
            file = file / "config.toml"
        base = file.resolve().parent
    tree = read_toml(file)
    base = Path(_base_folder(tree.pop("paths", {}), file) or base)
    label = "the embedded default" if path is None else str(file)
    settings = parse_overrides(overrides)
    _let_url_replace_model(tree, dict(settings))
    tree = overridden(tree, settings, source="command line")
    return Run(from_tree(tree, source=label), base, label)


def _let_url_replace_model(tree: dict[str, Any], given: Mapping[str, Any]) -> None:
    """On the command line a teacher's url stands for the model that the file names."""
    for key, value in given.items():
        *path, last = key.split(".")
        table: Any = tree
        for part in path:
            table = table.get(part, {}) if isinstance(table, dict) else {}
        if last == "url" and value and ".".join((*path, "model")) not in given:
            table.pop("model", None)


def overridden(
    tree: Mapping[str, Any], settings: Iterable[tuple[str, Any]], *, source: str
) -> dict[str, Any]:
    """The tree with some values replaced.

    Args:
        settings: dotted keys and their values.
        source: where they are from, for messages.

    Raises:
        ConfigError: a key that is not known; names the nearest.
    """
    changed = copy.deepcopy(dict(tree))
    for key, value in settings:
        alone: dict[str, Any] = {}
        _set(alone, key, value)
        _check_keys(alone, RunConfig, "", source)
        _set(changed, key, value)
    return changed


def from_tree(tree: Mapping[str, Any], *, source: str = "<python>") -> RunConfig:
    """A checked config from nested mappings; `method = "NAME"` is short for its table."""
    tree = dict(tree)
    if isinstance(tree.get("method"), str):
        tree["method"] = {"name": tree["method"]}
    _check_keys(tree, RunConfig, "", source)
    _check_plain(tree, "", source)
    adapter = TypeAdapter(RunConfig)
    try:
        adapter.validate_python(tree)  # as given first: no message about a default that follows
        config = adapter.validate_python(_with_dependent_defaults(tree))
    except ValidationError as error:
        raise ConfigError(_readable(error, source)) from None
    check_names(config, source)
    check_teacher_tables(config, source)
    check_declared(config.check, source)
    check_alarms(config.monitor, source)
    check_golden(config, source)
    lora, model = config.student.lora, config.student.model
    if lora.r and not lora.merge and model.startswith("builtin:"):
        raise ConfigError(
            f"{source}: student.lora.merge = false writes the adapter alone, but {model} is drawn "
            "at random, so its adapter would be worth nothing; leave merge = true"
        )
    return config


def check_teacher_tables(config: RunConfig, source: str) -> None:
    """Refuse a teacher that is both loaded here and asked elsewhere, or a route to nobody.

    Raises:
        ConfigError: names the table.
    """
    _check_route(config, source)
    tables = {"teacher": config.teacher}
    tables |= {f"teachers.{name}": table for name, table in config.teachers.items()}
    for name, table in tables.items():
        if table.model and table.url:
            raise ConfigError(
                f"{source}: {name}.model = {table.model!r} and {name}.url = {table.url!r}: a "
                "teacher is loaded here or asked there; keep one, and name a copy to compare with "
                f"as {name}.local_copy"
            )
        if table.url and not table.url.startswith(("http://", "https://")):
            raise ConfigError(
                f"{source}: {name}.url = {table.url!r} must begin with http:// or https://"
            )
        _check_place(table, name, source)
        _check_cache(table.cache, name, source)
    _check_shared_folders(tables, source)


def _check_place(table: TeacherConfig, name: str, source: str) -> None:
    """Keys about a teacher elsewhere where it is here, or the other way round."""
    alone: tuple[str, ...] = SERVED_ALONE
    where = "at a url, and this one has none"
    if table.url:
        alone = ("keep",) if table.local_copy else LOADED_ALONE
        where = "that is loaded here, and this one is asked at a url"
    for key in alone:
        if getattr(table, key) != getattr(TeacherConfig, key):
            raise ConfigError(
                f"{source}: {name}.{key} = {getattr(table, key)!r} is about a teacher {where}; "
                "leave it out"
            )


def _check_cache(cache: CacheConfig, name: str, source: str) -> None:
    if not cache.folder and cache != CacheConfig():
        raise ConfigError(
            f"{source}: [{name}.cache] names no folder, so its other keys say nothing; name the "
            f"folder that holds the answers as {name}.cache.folder"
        )


def _check_shared_folders(tables: Mapping[str, TeacherConfig], source: str) -> None:
    """One folder has one bound."""
    bounds: dict[str, tuple[str, int]] = {}
    for name, table in tables.items():
        cache = table.cache
        folder = str(Path(cache.folder))
        first, bound = bounds.setdefault(folder, (name, cache.max_bytes))
        if cache.folder and cache.max_bytes != bound:
            raise ConfigError(
                f"{source}: {first}.cache and {name}.cache share the folder {cache.folder!r}, and "
                f"max_bytes is {bound} in the one and {cache.max_bytes} in the other; a folder has "
                "one bound"
            )


def _check_route(config: RunConfig, source: str) -> None:
    own, named = config.teacher, config.teachers
    for name, table in named.items():
        for key in ("route", "conflict_every"):
            if getattr(table, key) != getattr(TeacherConfig, key):
                raise ConfigError(
                    f"{source}: teachers.{name}.{key} = {getattr(table, key)!r}: {key} belongs to "
                    f"[teacher] alone; set teacher.{key}"
                )
        if not (table.model or table.url or table.cache.offline):
            raise ConfigError(
                f"{source}: [teachers.{name}] has neither a model nor a url; name one of them"
            )
    if not own.route:
        return
    if own.cache.folder:
        raise ConfigError(
            f"{source}: teacher.route = {own.route!r} and teacher.cache.folder = "
            f"{own.cache.folder!r}: with a route the answers are those of the teachers it goes to; "
            "give each of them a [teachers.NAME.cache]"
        )
    for key in ("model", "url", "keep"):
        if getattr(own, key) != getattr(TeacherConfig, key):
            raise ConfigError(
                f"{source}: teacher.route = {own.route!r} and teacher.{key} = "
                f"{getattr(own, key)!r}: with a route the models are those of [teachers.NAME]; "
                "keep one of the two"
            )
    if not named:
        raise ConfigError(
            f"{source}: teacher.route = {own.route!r} and there are no [teachers.NAME] to go to; "
            "add a table for every teacher"
        )


def check_names(config: RunConfig, source: str) -> None:
    """Refuse a method or a method option that does not exist, before any library loads."""
    from opd.catalog import methods

    known = methods()
    method = config.method
    if method.name == "custom":
        if not method.objective:
            raise ConfigError(
                f"{source}: method.name is 'custom' but there is no [method.objective]; "
                "add its terms or name a method of `opd list methods`"
            )
        return
    if method.objective or method.states or method.views:
        raise ConfigError(
            f"{source}: method.objective, .states and .views belong to method.name = 'custom', "
            f"but the method is {method.name!r}"
        )
    if method.name not in known:
        raise ConfigError(
            f"{source}: method.name = {method.name!r} is no method. "
            f"{nearest(method.name, [*known, 'custom'])}"
        )
    for option in method.options:
        if option not in known[method.name].knobs:
            raise ConfigError(
                f"{source}: method.options.{option}: {method.name} has no option {option!r}. "
                f"{nearest(option, known[method.name].knobs)}"
            )


def check_declared(config: CheckConfig, source: str) -> None:
    """Refuse a declaration of a rule that does not exist, or of one that takes none."""
    if not config.declared:
        return
    from opd.catalog import rules

    levels = {name: rule.level for name, rule in rules().items()}
    declarable = [name for name, level in levels.items() if level == "must be declared"]
    for name in config.declared:
        if name not in levels:
            raise ConfigError(
                f"{source}: check.declared: {name!r} is no rule. {nearest(name, declarable)}"
            )
        if name not in declarable:
            raise ConfigError(
                f"{source}: check.declared: {name!r} is a rule of level {levels[name]!r}, which "
                "takes no declaration; leave it out"
            )


def check_golden(config: RunConfig, source: str) -> None:
    """Refuse a golden set that nobody measures."""
    sets = config.evaluate.sets
    for name in config.monitor.golden:
        if name not in sets:
            raise ConfigError(
                f"{source}: monitor.golden: {name!r} is no set of evaluate.sets; give it a source "
                f'there, such as evaluate.sets = {{ {name} = "task:sort" }}. {nearest(name, sets)}'
            )
    if config.monitor.golden and config.data.verifier == "none":
        raise ConfigError(
            f'{source}: monitor.golden names sets to be watched, and data.verifier is "none", so '
            "nobody says what is right; name a verifier, or leave golden out"
        )
    if config.monitor.golden and not (config.monitor.on and config.evaluate.every):
        key = "evaluate.every is 0" if config.monitor.on else "monitor.on is false"
        raise ConfigError(
            f"{source}: monitor.golden names sets to be watched, and {key}: nobody would measure "
            "them during training; set it, or leave golden out"
        )


def check_alarms(config: MonitorConfig, source: str) -> None:
    """Refuse an alarm that does not exist, and an action that would never happen."""
    if not config.on and config.on_alarm != "log":
        raise ConfigError(
            f"{source}: monitor.on_alarm is {config.on_alarm!r}, and monitor.on is false, so there "
            "are no alarms; set one of the two otherwise"
        )
    if config.act and config.on_alarm != "act":
        raise ConfigError(
            f"{source}: monitor.act says what alarms do, and monitor.on_alarm is "
            f'{config.on_alarm!r}; set on_alarm = "act" or leave act out'
        )
    if config.on_alarm == "act" and not config.act:
        raise ConfigError(
            f'{source}: monitor.on_alarm = "act" and [monitor.act] names no alarm; name what is to '
            'be done, such as length_inflation = "lower_rate"'
        )
    if not (config.act or config.off):
        return
    from opd.catalog import alarms

    known = alarms()
    named = {"act": tuple(config.act), "off": config.off}
    for key, names in named.items():
        for name in names:
            if name not in known:
                raise ConfigError(
                    f"{source}: monitor.{key}: {name!r} is no alarm. {nearest(name, known)}"
                )
    for name in config.act:
        if not config.every and any("/look/" in metric for metric in known[name].reads):
            raise ConfigError(
                f"{source}: monitor.act names {name!r}, which is seen in looks, and monitor.every "
                "is 0, so none are taken; set every, or leave the alarm out"
            )
        if name == "golden_regression" and not config.golden:
            raise ConfigError(
                f"{source}: monitor.act names {name!r}, and monitor.golden names no set to watch; "
                "name one of evaluate.sets there, or leave the alarm out"
            )
        if name in config.off:
            raise ConfigError(
                f"{source}: monitor.act and monitor.off both name {name!r}; keep one of the two"
            )


def read_toml(file: Path) -> dict[str, Any]:
    """The file's tree, or an error that says where it is wrong."""
    if not file.exists():
        siblings = (
            [path.name for path in file.parent.glob("*.toml")] if file.parent.is_dir() else []
        )
        close = difflib.get_close_matches(file.name, siblings, n=1)
        hint = f"Did you mean {close[0]!r}?" if close else "`opd init` writes one that works."
        raise ConfigError(f"there is no run file {str(file)!r}. {hint}")
    try:
        return tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not valid TOML: {error}") from None


def parse_overrides(words: Sequence[str]) -> list[tuple[str, Any]]:
    """`--train.steps 50 --seed=3` as pairs; values are read as TOML, else taken as text."""
    pairs: list[tuple[str, Any]] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or len(word) < 3:
            raise ConfigError(f"expected --section.key VALUE, got {word!r}; see `opd run --help`")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"--{key} has no value; write --{key} VALUE")
            value = rest.pop(0)
        name = key.replace("-", "_")
        read = _literal(value)
        pairs.append((name, value if _takes_text(name) and not isinstance(read, str) else read))
    return pairs


def dotted_keys(kind: Any = RunConfig, path: str = "") -> list[str]:
    """Every key of a run file, as on the command line."""
    keys = []
    for name, below in get_type_hints(kind).items():
        dotted = f"{path}.{name}" if path else name
        keys += dotted_keys(below, dotted) if dataclasses.is_dataclass(below) else [dotted]
    return keys


def to_toml(config: RunConfig) -> str:
    """The config as a run file that repeats the run: every key, defaults included."""
    return _tables(dataclasses.asdict(config), ())


def to_json(config: RunConfig) -> str:
    """The config as JSON with sorted keys, for comparison and hashing."""
    return json.dumps(dataclasses.asdict(config), sort_keys=True)


# --------------------------------------------------------------------------------------------


def _base_folder(paths: Any, file: Path) -> str:
    """Where the relative paths of a run folder's config start; empty in any other run file."""
    folder = paths.get("base_folder", "") if isinstance(paths, Mapping) else paths
    if not isinstance(folder, str):
        raise ConfigError(
            f"{file}: paths = {paths!r}: `base_folder` in [paths] is the folder in which relative "
            "paths start; leave the table out"
        )
    return folder


def _takes_text(dotted: str) -> bool:
    """Whether a key holds a text, so that `--name 7` is the name '7'."""
    kind: Any = RunConfig
    for part in dotted.split("."):
        kind = get_type_hints(kind).get(part) if dataclasses.is_dataclass(kind) else None
    return kind is str


def _check_plain(value: Any, path: str, source: str) -> None:
    """Refuse what a run folder's files could not repeat: dates and times, and None."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            _check_plain(part, f"{path}.{key}" if path else str(key), source)
    elif isinstance(value, list | tuple):
        for part in value:
            _check_plain(part, path, source)
    elif isinstance(value, datetime.date | datetime.time):
        raise ConfigError(
            f'{source}: {path} = {value} is a date or a time; put it in quotes: "{value}"'
        )
    elif value is None:
        raise ConfigError(f"{source}: {path} = None cannot be written in a run file; leave it out")


def _literal(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _set(tree: dict[str, Any], dotted: str, value: Any) -> None:
    if dotted == "method" and isinstance(value, str):
        dotted = "method.name"
    *sections, last = dotted.split(".")
    for section in sections:
        below = tree.get(section)
        if section == "method" and isinstance(below, str):
            below = {"name": below}
        if not isinstance(below, dict):
            below = {}
        tree[section] = below
        tree = below
    if dotted == "method.name" and tree.get("name") != value:
        for key in ("options", "objective", "states", "views"):  # the other method's own
            tree.pop(key, None)
    tree[last] = value


# A response of a built-in task, its end token included, is shorter than this.
_TASK_TOKENS = 64


def _with_dependent_defaults(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in the two defaults that follow from another key; what is given stays as it is."""
    filled = dict(tree)

    def given(section: str) -> dict[str, Any]:
        table = tree.get(section, {})
        return dict(table) if isinstance(table, Mapping) else {}

    if str(given("data").get("prompts", "")).startswith("task:"):
        _default(filled, "sampler", max_new_tokens=_TASK_TOKENS)
    if "learning_rate" in given("train"):
        _default(filled, "warmup", learning_rate=given("train")["learning_rate"])
    return filled


def _default(tree: dict[str, Any], section: str, **values: Any) -> None:
    table = tree.get(section, {})
    if isinstance(table, Mapping):
        tree[section] = {**values, **table}


def _check_keys(tree: Any, kind: Any, path: str, source: str) -> None:
    """Unknown keys, with the nearest known one."""
    if not dataclasses.is_dataclass(kind) or not isinstance(tree, Mapping):
        return
    hints = get_type_hints(kind)
    known = [item.name for item in dataclasses.fields(kind)]
    for key, value in tree.items():
        if key not in known:
            where = f" in [{path}]" if path else ""
            raise ConfigError(f"{source}: unknown key {key!r}{where}. {nearest(key, known)}")
        _check_keys(value, hints[key], f"{path}.{key}" if path else key, source)


def _readable(error: ValidationError, source: str) -> str:
    lines = []
    for problem in error.errors():
        place = ".".join(str(part) for part in problem["loc"])
        got = problem.get("input")
        if problem["type"] == "missing":
            lines.append(f"{source}: {place} is missing; every run needs it")
        elif problem["type"] == "literal_error":
            options = _options(place)
            hint = nearest(str(got), options) if options else problem["msg"]
            lines.append(f"{source}: {place} = {got!r} is not valid. {hint}")
        else:
            lines.append(f"{source}: {place} = {got!r}: {problem['msg']}")
    return "\n".join(lines)


def _options(place: str) -> list[str]:
    kind: Any = RunConfig
    for part in place.split("."):
        if not dataclasses.is_dataclass(kind):
            return []
        kind = get_type_hints(kind).get(part)
    return [str(value) for value in get_args(kind)] if get_origin(kind) is Literal else []


def _tables(tree: Mapping[str, Any], path: tuple[str, ...]) -> str:
    plain = {key: value for key, value in tree.items() if not isinstance(value, dict)}
    lines = [f"[{'.'.join(path)}]"] if path else []
    lines += [f"{_key(key)} = {_value(value)}" for key, value in plain.items()]
    text = "\n".join(lines) + "\n"
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            text += "\n" + _tables(value, (*path, _key(key)))
    return text


def _key(key: str) -> str:
    bare = key.isascii() and key.replace("_", "").replace("-", "").isalnum()
    return key if bare else _text(key)


def _text(text: str) -> str:
    """A TOML string; of what JSON leaves as it is, TOML refuses only the delete character."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(k)} = {_value(v)}" for k, v in value.items()) + " }"
    if isinstance(value, Sequence):
        return "[" + ", ".join(_value(part) for part in value) + "]"
    return repr(value)
