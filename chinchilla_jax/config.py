"""Every setting of an experiment: its type, unit, default, and the reason for the default.

This is the inside of the configuration: frozen dataclasses, so that code has types and a
typo cannot pass. `config_io` turns files and flags (ml_collections) into an `Experiment`.
Imports neither JAX nor ml_collections.

The class of a field says when it may change:

  identity     what the run computes; never changes within a run
  store        what `prepare` makes; a run holds on to the store's fingerprint instead
  length       how long the run is; may change on resume
  layout       how it is computed; may change on resume, results equal up to summation order
  guard        what is done when numbers go wrong; may change on resume, and then results may too
  observation  what is logged, evaluated and kept; may change on resume
"""

import dataclasses
from typing import Any

KINDS = ("identity", "store", "length", "layout", "guard", "observation")
DTYPES = ("bfloat16", "float32")


def setting(default: Any, why: str, *, unit: str = "", kind: str = "identity",
            choices: tuple = (), at_least: float | None = None, above: float | None = None,
            at_most: float | None = None, duration: bool = False) -> Any:
  """A dataclass field with its reason and limits."""
  assert kind in KINDS
  return dataclasses.field(default=default, metadata=dict(
      why=why, unit=unit, kind=kind, choices=choices, at_least=at_least, above=above,
      at_most=at_most, duration=duration))


@dataclasses.dataclass(frozen=True)
class Model:
  """The transformer. Defaults: the paper's architecture in the smallest shape of Table A9."""

  n_layers: int = setting(8, "Table A9, 44M", at_least=1)
  d_model: int = setting(512, "Table A9, 44M", at_least=1)
  n_heads: int = setting(8, "Table A9, 44M", at_least=1)
  kv_size: int = setting(
      64, "Table A9, 44M; six rows have kv_size != d_model / n_heads", unit="per head", at_least=1)
  d_ff: int = setting(2048, "4·d_model in every row of Table A9", at_least=1)
  vocab_size: int = setting(32_000, "Chinchilla and Gopher", unit="pieces", at_least=2)
  position: str = setting(
      "relative", "Gopher and Chinchilla: Transformer-XL (Dai et al. 2019); rotary: Su et al. 2021",
      choices=("relative", "rotary"))
  rotary_base: float = setting(10_000.0, "Su et al. 2021; read when position is rotary", above=1)
  activation: str = setting(
      "gelu", "not stated; Gopher builds on GPT-2, which uses the tanh form; swiglu: Shazeer 2020",
      choices=("gelu", "gelu_exact", "relu", "swiglu"))
  bias: bool = setting(
      True, "the paper's parameter counts need one on every matrix but those of queries, keys and "
      "values, and on the logits; False: on none, as in PaLM and Llama")
  qk_norm: bool = setting(
      False, "not in the paper; widens the usable range of LR (Wortsman et al. 2023)")
  init: str = setting(
      "gpt2", "not stated; gpt2: N(0, init_std), residual outputs / sqrt(2·n_layers); "
      "fan_in: truncated normal of std 1/sqrt(fan in), Haiku's default", choices=("gpt2", "fan_in"))
  init_std: float = setting(0.02, "Radford et al. 2019; read when init is gpt2", above=0)
  norm_epsilon: float = setting(1e-6, "not stated; Zhang & Sennrich 2019 leave it open", above=0)
  parametrisation: str = setting(
      "standard", "the paper's: one learning rate for all, tuned at each size; mup: it transfers "
      "over width (Yang et al. 2022); completep: over width and depth (Dey et al. 2025); see "
      "docs/parametrisation.md", choices=("standard", "mup", "completep"))
  base_width: int = setting(
      512, "d_model of the small model that was tuned, where mup's and completep's factors are 1; "
      "default: the smallest row of Table A9", at_least=1)
  base_depth: int = setting(
      8, "n_layers of the small model that was tuned; read when parametrisation is completep",
      at_least=1)
  base_kv_size: int = setting(
      64, "kv_size of the small model that was tuned: mup and completep divide scores by "
      "kv_size / sqrt(base_kv_size)", unit="per head", at_least=1)
  remat: str = setting(
      "dots", "the backward pass recomputes nothing, all but matrix products, or all of a block; "
      "dots took half the memory of none in the same time (docs/performance.md)",
      kind="layout", choices=("none", "dots", "full"))
  scan_unroll: int = setting(
      1, "layers per iteration of the scan; more compile time for less loop", kind="layout",
      at_least=1)
  attention_kernel: str = setting(
      "auto", "auto: the first that the devices can run, see docs/attention.md; blockwise: plain "
      "JAX, everywhere; relative_tpu: relative positions on TPU; splash: rotary on TPU; cudnn: "
      "rotary on GPU without config.data.document_mask", kind="layout",
      choices=("auto", "blockwise", "relative_tpu", "splash", "cudnn"))
  attention_block: int = setting(
      128, "blockwise: query rows whose scores are in memory at once; 0: all rows", unit="tokens",
      kind="layout", at_least=0)


@dataclasses.dataclass(frozen=True)
class Precision:
  """Number formats. Softmax, loss, norms and moments are float32 whatever stands here."""

  parameters: str = setting("bfloat16", "Chinchilla section 4.1: bfloat16 with a float32 copy",
                            choices=DTYPES)
  activations: str = setting("bfloat16", "Chinchilla: forward and backward in bfloat16",
                             choices=DTYPES)
  gradients: str = setting(
      "parameters", "dtype in which the backward pass hands gradients over and devices add "
      "them up: that of the parameters, or float32; sums over microbatches are float32 always",
      choices=("parameters", "float32"))
  rounding: str = setting(
      "master", "how bfloat16 parameters take an update: master, a float32 copy in the optimizer "
      "state (Chinchilla); stochastic, rounding at random without a copy (Gopher)",
      choices=("master", "stochastic"))


@dataclasses.dataclass(frozen=True)
class Batch:
  """Sequences per step."""

  sequences: int = setting(
      128, "262,144 tokens at 2048, the unit of the paper's analysis runs", unit="sequences",
      at_least=1)
  ramp: tuple[tuple[str, int], ...] = setting(
      (), "later batch sizes: (('50%', 1536),) doubles at half the tokens, as Chinchilla 70B did",
      unit="(duration, sequences)")
  microbatches: int = setting(
      1, "parts in which a step's gradient is summed; raise it when memory is short",
      kind="layout", at_least=1)
  ramp_by: str = setting(
      "microbatches", "how a device copes with a later, larger batch: microbatches, more of them "
      "and none larger, so that memory stays; size, as many of them and larger ones",
      kind="layout", choices=("microbatches", "size"))


@dataclasses.dataclass(frozen=True)
class Mesh:
  """How the run lies over devices: a strategy, and the sizes of the mesh's axes."""

  strategy: str = setting(
      "fsdp", "replicated: every device holds all; fsdp: parameters and optimizer over data; "
      "deepmind: the paper's, parameters over tensor, optimizer state over tensor and data; "
      "fsdp_tensor: all over tensor and data (docs/parallelism.md)", kind="layout",
      choices=("replicated", "fsdp", "deepmind", "fsdp_tensor"))
  slice: int = setting(
      0, "slices joined by the data-centre network, each with a copy of everything; 0: as many as "
      "the devices say they lie in (GPUs: nodes); 1: data goes across them", unit="slices",
      kind="layout", at_least=0)
  data: int = setting(
      0, "parts of the batch in a slice; 0: all devices that the other axes leave",
      unit="devices", kind="layout", at_least=0)
  context: int = setting(1, "parts of each sequence, for long ones", unit="devices",
                         kind="layout", at_least=1)
  tensor: int = setting(1, "parts of each layer: heads, feed-forward, vocabulary",
                        unit="devices", kind="layout", at_least=1)
  whole_below: int = setting(
      65_536, "weights with fewer elements (of one layer) are not cut over data: a gather costs "
      "more than it saves", unit="elements", kind="layout", at_least=0)
  compiler_flags: bool = setting(
      True, "the compiler's flags that were measured for these devices "
      "(parallel/compiler_flags.py); false: its defaults", kind="layout")
  overrides: tuple[tuple[str, str], ...] = setting(
      (), "shardings by path in the train state, first match wins, such as "
      "(('params/embedding/table', 'tensor,-'),): one entry per axis of the array, '-' for "
      "whole, '+' joins mesh axes", unit="(regex, spec)", kind="layout")


@dataclasses.dataclass(frozen=True)
class Corpus:
  """Where documents come from. Read by `prepare`."""

  sources: tuple[str, ...] = setting(
      ("stdlib",), "text on every machine; else files, folders, globs, or tfds:NAME", kind="store")
  text_field: str = setting(
      "text", "field of JSON lines, Parquet and TFDS records that is the text", kind="store")
  tfds_data_dir: str = setting("", "where TFDS keeps its datasets; empty: TFDS's default",
                               kind="layout")
  validation_fraction: float = setting(
      0.01, "share of documents held out, chosen by a hash of their path", kind="store",
      above=0, at_most=0.5)


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """SentencePiece with byte fallback and no normalisation. Read by `prepare`."""

  vocab_size: int = setting(
      32_000, "Chinchilla; an upper limit, small corpora get fewer", unit="pieces", kind="store",
      at_least=300)
  model_type: str = setting("unigram", "SentencePiece's default; the paper names none",
                            kind="store", choices=("unigram", "bpe"))
  sample_bytes: int = setting(
      100_000_000, "text the trainer sees; SentencePiece holds all of it in memory", unit="bytes",
      kind="store", at_least=1)
  path: str = setting("", "reuse this tokenizer (a .model file or a store) and train none",
                      kind="store")


@dataclasses.dataclass(frozen=True)
class Data:
  """The token store and how sequences are cut from it."""

  store: str = setting("stores/stdlib", "directory of the token store", kind="layout")
  seq_len: int = setting(2048, "Gopher and Chinchilla", unit="tokens", at_least=1)
  shuffle: bool = setting(True, "a new permutation of the sequences in every epoch")
  document_mask: bool = setting(True, "documents in a sequence do not attend to each other")
  prefetch: int = setting(2, "batches prepared ahead by a background thread", unit="batches",
                          kind="layout", at_least=1)
  verify: str = setting(
      "auto", "what is checked against the ledger before the first step: full, every checksum; "
      "sizes, file sizes; auto, full for stores of up to 4 GB", kind="layout",
      choices=("auto", "full", "sizes"))


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """AdamW (Loshchilov & Hutter 2019)."""

  peak_lr: float = setting(2e-4, "Chinchilla's smallest models; 1e-4 for 70B", above=0)
  b1: float = setting(0.9, "not stated; RETRO, Wikitext103 table", at_least=0, at_most=1)
  b2: float = setting(0.95, "not stated; RETRO, Wikitext103 table", at_least=0, at_most=1)
  eps: float = setting(1e-8, "not stated; RETRO, Wikitext103 table", at_least=0)
  weight_decay: float = setting(
      0.1, "not stated; RETRO: all models use 0.1; multiplied by the learning rate", at_least=0)
  decay_patterns: tuple[tuple[str, float], ...] = setting(
      ((r"(norm|bias|/u$|/v$)", 0.0), (r".*", 1.0)),
      "factor on weight_decay by parameter path, first match wins; gains, biases, u and v are "
      "not decayed", unit="(regex, factor)")
  lr_patterns: tuple[tuple[str, float], ...] = setting(
      (), "factor on the learning rate by parameter path, first match wins, 1 where none is found; "
      "decay follows it; 0 freezes; times the factor of model.parametrisation",
      unit="(regex, factor)")
  clip_norm: float = setting(
      1.0, "Gopher; 0.25 for its 7.1B and 280B; global norm in float32; 0: no clipping", at_least=0)


@dataclasses.dataclass(frozen=True)
class Schedule:
  """Learning rate over the run."""

  shape: str = setting(
      "cosine", "Chinchilla: cosine matched to the run; wsd: Hägele et al. 2024",
      choices=("cosine", "wsd", "constant"))
  warmup: str = setting("1500 steps", "Gopher: linear over 1,500 steps", duration=True)
  warmup_from: float = setting(1e-7, "Gopher", unit="learning rate", at_least=0)
  final_ratio: float = setting(
      0.1, "Chinchilla: cosine to a tenth of the peak; wsd ends at 0 in its paper", at_least=0,
      at_most=1)
  cooldown: str = setting(
      "20%", "Hägele et al. 2024; 1-sqrt; read when shape is wsd", duration=True)


@dataclasses.dataclass(frozen=True)
class Loss:
  """Cross-entropy in float32."""

  z_loss: float = setting(0.0, "not in the paper; PaLM: 1e-4 · log²Z", at_least=0)
  chunk: int = setting(
      1024, "tokens whose logits are in memory at once; 0: all", unit="tokens", kind="layout",
      at_least=0)


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """The fixed validation set."""

  every: str = setting("5%", "twenty points on the curve; 0 steps: only at the end",
                       kind="observation", duration=True)
  max_tokens: int = setting(
      0, "validation tokens per evaluation, from the start of the split; 0: all", unit="tokens",
      kind="observation", at_least=0)
  batch: int = setting(0, "sequences per evaluation batch; 0: as in training", unit="sequences",
                       kind="layout", at_least=0)
  sample_tokens: int = setting(
      0, "length of a text that is generated at every evaluation and kept in the log; 0: none; "
      "with one process only", unit="pieces", kind="observation", at_least=0)
  sample_prompt: str = setting("", "how that text begins", kind="observation")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """What is saved, when, and what is kept."""

  every: str = setting("5%", "at most a twentieth of the run is lost; 0 steps: only at the end",
                       kind="observation", duration=True)
  keep: int = setting(3, "newest checkpoints that are kept", unit="checkpoints",
                      kind="observation", at_least=1)
  keep_every: str = setting("0 steps", "also keep a checkpoint this often for good; 0 steps: none",
                            kind="observation", duration=True)
  asynchronous: bool = setting(True, "write while training goes on", kind="layout")
  failures: int = setting(
      3, "saves in a row that may fail (a full disk, say) before the run stops; 0: any number",
      unit="saves", kind="observation", at_least=0)
  verify: str = setting(
      "full", "what is checked before a checkpoint is used: full, every checksum; sizes, file "
      "sizes", kind="layout", choices=("full", "sizes"))
  init_from: str = setting("", "a run whose newest parameters a new run starts from")


@dataclasses.dataclass(frozen=True)
class Guard:
  """What a run does when its numbers go wrong, or nothing happens any more."""

  nonfinite_limit: int = setting(
      20, "steps with a non-finite loss, gradient or update are skipped; stop after this many in "
      "a row",
      unit="steps", kind="guard", at_least=1)
  spikes: str = setting(
      "log", "when loss or update norm stands out: log, only say so; skip, leave that update out "
      "(OLMo-core); rollback, go back to a checkpoint before it and leave the batches "
      "around it out (PaLM, section 5.1)", kind="guard", choices=("log", "skip", "rollback"))
  spike_threshold: float = setting(
      6.0, "OLMo-core's skip-step optimizers: this far above the running mean",
      unit="standard deviations", kind="guard", above=0)
  spike_window: int = setting(
      128, "OLMo-core; memory of the running mean, and steps before the first judgement",
      unit="steps", kind="guard", at_least=2)
  rollback_before: int = setting(
      20, "batches before the spike's that are left out; PaLM left out 200 to 500 around it",
      unit="batches", kind="guard", at_least=0)
  rollback_after: int = setting(80, "batches after the spike's that are left out", unit="batches",
                                kind="guard", at_least=0)
  rollback_limit: int = setting(
      5, "rollbacks after which the next spike stops the run: then something else is wrong",
      unit="rollbacks", kind="guard", at_least=1)
  hang_after: float = setting(
      1800.0, "without a step, the process prints all its stacks and ends with the status that "
      "means run me again; an hour at least for the first step, which compiles; 0: never",
      unit="seconds", kind="guard", at_least=0)


@dataclasses.dataclass(frozen=True)
class Logging:
  """Where metrics go. JSON lines are always written."""

  every: str = setting("1 steps", "between lines of metrics.jsonl", kind="observation",
                       duration=True)
  console: str = setting("2%", "between plain console lines where there is no terminal",
                         kind="observation", duration=True)
  tensorboard: bool = setting(True, "event files in the run's folder", kind="observation")
  wandb: str = setting("", "Weights & Biases project; empty: none", kind="observation")


@dataclasses.dataclass(frozen=True)
class Profile:
  """A trace of what host and devices do."""

  steps: str = setting(
      "", "steps that are traced into the run's folder, such as 100-102, counted from 1; empty: "
      "none (docs/performance.md)", unit="FIRST-LAST", kind="observation")


@dataclasses.dataclass(frozen=True)
class Experiment:
  """One run, from text to checkpoint."""

  name: str = setting("run", "the run's folder is runs/NAME unless --workdir says otherwise",
                      kind="observation")
  seed: int = setting(0, "of initialisation, data order and stochastic rounding", at_least=0,
                      at_most=2**31 - 1)
  run_length: str = setting(
      "20 tokens/param", "compute-optimal by the paper's Approaches 1 and 2", kind="length",
      duration=True)
  model: Model = dataclasses.field(default_factory=Model)
  precision: Precision = dataclasses.field(default_factory=Precision)
  batch: Batch = dataclasses.field(default_factory=Batch)
  mesh: Mesh = dataclasses.field(default_factory=Mesh)
  corpus: Corpus = dataclasses.field(default_factory=Corpus)
  tokenizer: Tokenizer = dataclasses.field(default_factory=Tokenizer)
  data: Data = dataclasses.field(default_factory=Data)
  optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
  schedule: Schedule = dataclasses.field(default_factory=Schedule)
  loss: Loss = dataclasses.field(default_factory=Loss)
  evaluation: Evaluation = dataclasses.field(default_factory=Evaluation)
  checkpoint: Checkpoint = dataclasses.field(default_factory=Checkpoint)
  guard: Guard = dataclasses.field(default_factory=Guard)
  logging: Logging = dataclasses.field(default_factory=Logging)
  profile: Profile = dataclasses.field(default_factory=Profile)


def fields(section: Any = Experiment, prefix: str = ""):
  """Yields (dotted name, dataclass field) for every setting, in the order of the schema."""
  for field in dataclasses.fields(section):
    if dataclasses.is_dataclass(field.type):
      yield from fields(field.type, f"{prefix}{field.name}.")
    else:
      yield f"{prefix}{field.name}", field
