"""Measure, before the run, whether the search server is fast enough for the planned rollout."""

from __future__ import annotations

from a2tgpo.config.run import RunConfig
from a2tgpo.io.errors import ConfigError
from a2tgpo.launch.run_plan import plan_of_run

NUM_QUERIES = 500
"""Number of training questions that the measurement sends as queries."""


def search_shortfall(config: RunConfig, *, num_gpus: int) -> tuple[str, bool]:
    """Return a line about a search server that is too slow, and whether the run must be refused.

    The line is empty if the server is fast enough or the run uses no server. The line is also empty if the server
    does not answer or no plan can be made, because other checks report these faults.
    """
    from a2tgpo.data.question_mix import load_question_mix
    from a2tgpo.search.burst import judge_burst, measure_burst

    if config.search.backend != "http" or "search" not in config.tools.names:
        return "", False
    try:
        plan, _, _ = plan_of_run(config, num_gpus=num_gpus)
        mix = load_question_mix(config.data.train_files, need_answers=False)
        questions = mix.questions[:NUM_QUERIES]
        demand = plan.searches
        burst = measure_burst(config.search, [q.question for q in questions], clients=demand.at_once)
    except ConfigError:
        return "", False
    return judge_burst(burst, needed_per_s=demand.per_second, max_shortfall=config.search.max_shortfall)
