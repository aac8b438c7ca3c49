"""Charts on TensorBoard's custom-scalars page. Each pattern matches from the start of a metric's name."""

_MULTILINE = "Multiline"

TENSORBOARD_LAYOUT = {
    "1 learning": {
        "reward": [_MULTILINE, [r"reward/mean$"]],
        "exact match while training": [_MULTILINE, [r"reward/em"]],
        "exact match, held out": [_MULTILINE, [r"evaluation/em"]],
        "F1, held out": [_MULTILINE, [r"evaluation/f1"]],
        "format errors": [_MULTILINE, [r"reward/format_error"]],
    },
    "2 turns and gain": {
        "gain by turn": [_MULTILINE, [r"gain/turn_\d+_mean$"]],
        "share of positive gains by turn": [_MULTILINE, [r"gain/turn_\d+_positive$"]],
        "gains that could not be computed": [_MULTILINE, [r"gain/missing"]],
        "answers by the trainer against the engine": [_MULTILINE, [r"gain/engine_trainer_gap"]],
        "turns": [_MULTILINE, [r"turns/"]],
        "groups drawn and dropped": [_MULTILINE, [r"sampling/"]],
        "carried over to later steps": [_MULTILINE, [r"partial/"]],
        "failed searches": [_MULTILINE, [r"tools/"]],
        "advantage": [_MULTILINE, [r"advantage/"]],
    },
    "3 clipping": {
        "clip fraction": [_MULTILINE, [r"clip/fraction"]],
        "clip fraction by turn": [_MULTILINE, [r"clip/turn_\d+"]],
        "clip scale": [_MULTILINE, [r"clip/scale"]],
        "ratio": [_MULTILINE, [r"ratio/"]],
    },
    "4 health": {
        "alarms": [_MULTILINE, [r"alarm/"]],
        "entropy": [_MULTILINE, [r"entropy/mean"]],
        "weight of the entropy": [_MULTILINE, [r"entropy/weight"]],
        "log-prob of sampled tokens": [_MULTILINE, [r"likelihood/"]],
        "loss": [_MULTILINE, [r"update/loss"]],
        "gradient norm": [_MULTILINE, [r"update/grad_norm"]],
        "updates extrapolated, and how far": [_MULTILINE, [r"extrapolation/"]],
        "learning rate": [_MULTILINE, [r"update/lr"]],
        "KL": [_MULTILINE, [r"kl/"]],
        "train-engine gap of log-probs": [_MULTILINE, [r"gap/"]],
        "rollout correction": [_MULTILINE, [r"correction/"]],
        "refit": [_MULTILINE, [r"refit/"]],
        "load of the busiest expert": [_MULTILINE, [r"experts/"]],
        "why rollouts stopped": [_MULTILINE, [r"stop/"]],
    },
    "5 speed": {
        "seconds by stage": [_MULTILINE, [r"time/(?!startup_)"]],
        "throughput": [_MULTILINE, [r"speed/"]],
        "lengths": [_MULTILINE, [r"length/"]],
        "host memory": [_MULTILINE, [r"memory/host_gib"]],
        "memory in use by phase": [_MULTILINE, [r"memory/.*_used_gib"]],
        "trainer state on the card by phase": [_MULTILINE, [r"memory/.*_trainer_gib"]],
    },
}
