"""The parameters of requests to tasks that write text."""

from __future__ import annotations

from traceserve_runtime.tasks.parameters import Parameter

# A request with one of them, and without do_sample, samples.
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "seed")
MAX_NEW_TOKENS = Parameter("max_new_tokens", int, "the most tokens to write; by default 256, or as many as fit")
PARAMETERS = (
    MAX_NEW_TOKENS,
    Parameter("min_new_tokens", int, "the fewest tokens to write", least=0, default=0),
    Parameter(
        "do_sample",
        bool,
        "sample each token by its probability instead of taking the best; implied by "
        f"{', '.join(SAMPLING[:-1])} or {SAMPLING[-1]}",
        default=False,
    ),
    Parameter(
        "temperature",
        float,
        "below 1 likely tokens become likelier; 0: always the best",
        least=0,
        most=100,
        default=1.0,
    ),
    Parameter("top_k", int, "sample only among this many likeliest tokens; 0: all", least=0, default=50),
    Parameter(
        "top_p",
        float,
        "sample only among the likeliest tokens with this total probability",
        least=0.0,
        most=1,
        default=1.0,
    ),
    Parameter(
        "min_p",
        float,
        "sample only among tokens at least this probable, relative to the likeliest",
        least=0,
        most=1,
        default=0.0,
    ),
    Parameter(
        "typical_p",
        float,
        "sample only among the most typical tokens with this total probability",
        least=0.01,
        most=1,
        default=1.0,
    ),
    Parameter("seed", int, "the same seed samples the same tokens", least=0, most=2**32 - 1),
    Parameter(
        "repetition_penalty",
        float,
        "above 1 repeated tokens become less likely",
        least=0.01,
        most=100,
        default=1.0,
    ),
    Parameter(
        "presence_penalty",
        float,
        "taken from the score of each token that was written before; below 0 they become likelier",
        least=-2,
        most=2,
        default=0.0,
    ),
    Parameter(
        "frequency_penalty",
        float,
        "taken from the score of each token as often as it was written before; below 0 they become likelier",
        least=-2,
        most=2,
        default=0.0,
    ),
    Parameter(
        "logit_bias",
        dict,
        "added to the scores of these tokens: -100 all but forbids one, 100 forces it",
        least=-100,
        most=100,
    ),
    Parameter("no_repeat_ngram_size", int, "no sequence of this many tokens is repeated; 0: off", least=0, default=0),
    Parameter("num_beams", int, "how many beams are searched", most=64, default=1),
    Parameter(
        "length_penalty",
        float,
        "in beam search: above 0 favours long texts, below 0 short ones",
        least=-2,  # below it, a long text's weighted score is less than `search._BAD`
        most=10,
        default=1.0,
    ),
    Parameter(
        "early_stopping",
        bool,
        "in beam search: stop at num_beams finished texts; never: only when no better one is possible",
        ("never",),
        default=False,
    ),
    # Each is looked for after each token of each text.
    Parameter("stop", list, "stop after one of these strings, which is part of the answer", most=16, longest=256),
    Parameter(
        "details",
        bool,
        "return why the text ended and each new token's log-probability; not for beam search",
        default=False,
    ),
    Parameter(
        "top_n_tokens",
        int,
        "with details: how many of the likeliest tokens to return at each position",
        least=0,
        most=20,
        default=0,
    ),
)
