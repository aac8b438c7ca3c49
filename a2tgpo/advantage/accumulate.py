"""Discounted sums over the turns of a trajectory, vectorised over trajectories."""

import torch


def discounted_suffix_sums(values: torch.Tensor, *, gamma: float) -> torch.Tensor:
    """Return D_t = sum_{k >= t} gamma^{k-t} values_k along the last axis of `values` [N, T].

    Columns past a trajectory's end must be 0.
    """
    sums = torch.zeros_like(values)
    running = values.new_zeros(values.shape[0])
    for column in reversed(range(values.shape[1])):
        running = values[:, column] + gamma * running
        sums[:, column] = running
    return sums


def accumulate_process_turns(
    normalized_gain: torch.Tensor, num_process_turns: torch.Tensor, *, gamma: float, rescale: bool
) -> torch.Tensor:
    """Return the discounted sums D_{i,t} / sqrt(n_i - t + 1) of process turns (Eq. 8).

    The sum D_{i,t} has n_i - t + 1 terms. If the terms are independent and have unit variance, and if gamma is 1, the
    division gives the sum unit variance.

    Args:
        normalized_gain: [N, T] float64, 0 in columns past n_i.
        num_process_turns: [N] int64: n_i.
        rescale: divide by the square root. If False, return D_{i,t}.

    Returns:
        [N, T] float64, 0 in columns past n_i.
    """
    sums = discounted_suffix_sums(normalized_gain, gamma=gamma)
    if not rescale:
        return sums
    turns = torch.arange(normalized_gain.shape[1], device=normalized_gain.device)
    terms = (num_process_turns[:, None] - turns).clamp(min=1)  # [N, T]: n_i - t + 1 with t = column + 1
    return sums / terms.to(sums.dtype).sqrt()


def place_turns(
    process_values: torch.Tensor, outcome: torch.Tensor, num_process_turns: torch.Tensor
) -> torch.Tensor:
    """Return the value plus the outcome for each process turn, and the outcome alone for the final turn (column n_i).

    `process_values` is [N, T]. `outcome` and `num_process_turns` are [N]. The result is [N, T + 1].
    """
    columns = torch.arange(process_values.shape[1] + 1, device=process_values.device)
    padded = torch.nn.functional.pad(process_values, (0, 1))  # [N, T + 1]
    in_process = columns < num_process_turns[:, None]
    in_trajectory = columns <= num_process_turns[:, None]
    return padded.where(in_process, 0.0) + outcome[:, None].where(in_trajectory, 0.0)
