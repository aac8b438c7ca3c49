"""Refuse combinations of settings that contradict each other.

Each setting is valid alone, but one setting would change or disable the effect of the other.
`RunConfig.check_training` refuses such a combination before anything is built. All other combinations work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from a2tgpo.config.algorithm import OF_INNER_BRANCHES, OF_TREES, WITH_CONTRAST, AlgorithmConfig
from a2tgpo.config.method_part import NO_CREDIT
from a2tgpo.io.errors import require
from a2tgpo.io.user_code import is_user_code

if TYPE_CHECKING:
    from a2tgpo.config.run import RunConfig

ONE_ADVANTAGE_PER_TRAJECTORY = ("grpo", "tree_grpo")
"""Methods of advantage/methods/ that give all turns of a trajectory the same advantage."""
GRADIENT_PER_TOKEN = ("cispo", "gspo_token")
"""Objectives of loss/objectives/ in which a token's gradient depends on its own advantage, whatever `algorithm.ratio`
is. In the other objectives, tokens that share a ratio also share the mean of their advantages."""
RATIO_OF_SEVERAL_TOKENS = ("gmpo", "gspo_token")
"""Objectives of loss/objectives/ that are defined only for the ratios of turns and sequences."""
WITHOUT_NORMALIZED_GAINS = ("appo", "gigpo", "grpo", "gtpo", "hgpo", *OF_TREES)
"""Methods of advantage/methods/ whose turns all have normalised gain 0."""
_SIZES = ("token", "turn", "sequence")


def check_combinations(config: RunConfig) -> None:
    """Raise `ConfigError` with a one-line message if two settings of the method cannot be combined."""
    algorithm = config.algorithm
    _check_ratio(algorithm)
    _check_clipping(algorithm)
    _check_tree(config)
    _check_inner_branches(config)
    require(
        algorithm.clip_cov_share == 0 or algorithm.token_credit == NO_CREDIT,
        "algorithm.clip_cov_share",
        algorithm.clip_cov_share,
        f"0 with algorithm.token_credit={algorithm.token_credit}, because Clip-Cov chooses tokens by the advantages "
        f"before the credit; set algorithm.token_credit={NO_CREDIT} to use Clip-Cov",
    )
    require(
        not config.rollout.router_replay or algorithm.token_credit not in WITH_CONTRAST,
        "rollout.router_replay",
        config.rollout.router_replay,
        f"false with algorithm.token_credit={algorithm.token_credit}, because the engine chose no experts for "
        "contrast prompts; set rollout.router_replay=false",
    )
    coef, rank = config.update.router_balance_coef, config.model.lora.rank
    require(
        coef == 0 or not config.model.lora.enabled,
        "update.router_balance_coef",
        coef,
        f"0 with model.lora.rank={rank}, because a run with adapters leaves the routers unchanged",
    )


def _check_ratio(algorithm: AlgorithmConfig) -> None:
    """Check that the unit of the ratio fits the objective, and is not larger than the unit of the advantage."""
    ratio, objective = algorithm.ratio, algorithm.objective
    require(
        ratio != "token" or objective not in RATIO_OF_SEVERAL_TOKENS,
        "algorithm.ratio",
        ratio,
        f"sequence | turn with algorithm.objective={objective}, whose ratio is one of several tokens; for token "
        "ratios set algorithm.objective=clipped_ratio",
    )
    if objective in GRADIENT_PER_TOKEN or is_user_code(objective):
        return
    unit, source = _unit_of_advantages(algorithm)
    units = _SIZES[: _SIZES.index(unit) + 1]
    if objective in RATIO_OF_SEVERAL_TOKENS:
        units = tuple(size for size in units if size != "token")
    mends = [f"algorithm.ratio={units[-1]}"] if units else []
    mends += ["algorithm.objective=gspo_token"] if ratio != "token" else []
    mends += (
        ["algorithm.contrast.level=turn"] if (unit, ratio, algorithm.token_credit) == _GCPO_OF_TURNS else []
    )
    require(
        ratio in units,
        "algorithm.ratio",
        ratio,
        f"{' | '.join(units) or 'no ratio'} with {source} and algorithm.objective={objective}, because the tokens "
        f"that share a ratio would share the mean of different advantages; set {' or '.join(mends)}",
    )


_GCPO_OF_TURNS = ("token", "turn", "gcpo")


def _unit_of_advantages(algorithm: AlgorithmConfig) -> tuple[str, str]:
    """Return the largest unit within which all advantages are equal, and the setting that determines the unit.

    For a user's advantage function the unit is the sequence, so that the user may choose any ratio.
    """
    if algorithm.token_credit == "gcpo" and algorithm.contrast.level == "turn":
        return "turn", "algorithm.token_credit=gcpo"
    if algorithm.token_credit != NO_CREDIT:
        return "token", f"algorithm.token_credit={algorithm.token_credit}"
    source = f"algorithm.advantage={algorithm.advantage}"
    if algorithm.advantage in OF_INNER_BRANCHES:
        return "token", source
    is_one = algorithm.advantage in ONE_ADVANTAGE_PER_TRAJECTORY or is_user_code(algorithm.advantage)
    return ("sequence" if is_one else "turn"), source


def _check_clipping(algorithm: AlgorithmConfig) -> None:
    """If `clip_beta` > 0, check that the objective has a clipping range, and that the advantage normalises gains."""
    beta = algorithm.clip_beta
    require(
        beta == 0 or algorithm.has_clipping_range,
        "algorithm.clip_beta",
        beta,
        f"0 with algorithm.objective={algorithm.objective}, which has no clipping range; set algorithm.clip_beta=0",
    )
    require(
        beta == 0 or algorithm.advantage not in WITHOUT_NORMALIZED_GAINS,
        "algorithm.clip_beta",
        beta,
        f"0 with algorithm.advantage={algorithm.advantage}, which normalises no gains that the clipping range could "
        "follow; set algorithm.clip_beta=0",
    )


def _check_tree(config: RunConfig) -> None:
    """Check that rollouts branch if and only if the advantage compares branches. A user's advantage function may be
    used with or without branches."""
    advantage, tree = config.algorithm.advantage, config.rollout.tree
    needs_tree = advantage in OF_TREES
    require(
        tree.is_on == needs_tree or is_user_code(advantage),
        "rollout.tree.initial",
        tree.initial,
        f">= 1 with algorithm.advantage={advantage}, which compares the branches of a tree; set "
        "rollout.tree.initial=2"
        if needs_tree
        else f"0 with algorithm.advantage={advantage}, which would count a shared turn once for each branch; set "
        f"algorithm.advantage={' or algorithm.advantage='.join(OF_TREES)}",
    )


def _check_inner_branches(config: RunConfig) -> None:
    """Check that a rollout has inner branches if and only if the advantage uses them.

    A user's advantage function may be used with or without them. No rollout has both inner branches and trees.
    """
    advantage, count = config.algorithm.advantage, config.rollout.inner_branches
    needs_branches = advantage in OF_INNER_BRANCHES
    require(
        (count > 0) == needs_branches or is_user_code(advantage),
        "rollout.inner_branches",
        count,
        f">= 1 with algorithm.advantage={advantage}, which uses the outcomes of inner branches; set "
        "rollout.inner_branches=8"
        if needs_branches
        else f"0 with algorithm.advantage={advantage}, which does not use the outcomes of inner branches; set "
        f"rollout.inner_branches=0 or algorithm.advantage={' or algorithm.advantage='.join(OF_INNER_BRANCHES)}",
    )
    require(
        count == 0 or not config.rollout.tree.is_on,
        "rollout.inner_branches",
        count,
        "0 with rollout.tree.initial > 0, since a rollout has one kind of branches; set rollout.tree.initial=0",
    )
