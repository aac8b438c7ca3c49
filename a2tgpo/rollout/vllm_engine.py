"""The inference engine, in the training process; the only module that imports vllm.

What vLLM does to its host process and is undone here: it seeds the global random generators, overwrites
torchrun's variables, and ends the process group of the trainer when an engine is shut down.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from a2tgpo.config.check import ConfigError, require
from a2tgpo.config.rollout import RolloutConfig
from a2tgpo.data.tokenizer import num_token_ids
from a2tgpo.data.weight_files import INDEX_FILE, weight_files
from a2tgpo.rollout.cpu_reload import reload_weights
from a2tgpo.rollout.cpu_shared_memory import own_segments
from a2tgpo.rollout.engine_arguments import LOAD_FORMAT, ON_GPU, engine_arguments
from a2tgpo.rollout.engine_guest import (
    MAX_CACHE_HIT,
    abort_in_order,
    cap_cache_hits,
    environment_kept,
    host_state_kept,
)
from a2tgpo.rollout.engine_limits import explain_refusal, read_model
from a2tgpo.rollout.engine_output import EngineOutput, ScoreOutput, generation_output, score_output
from a2tgpo.rollout.lockstep import Lockstep, LockstepError
from a2tgpo.rollout.weight_names import checked_weights, checkpoint_shapes


def _cache_root() -> Path:
    """Where vLLM keeps what it found out about architectures (10 s each to find out again)."""
    checkout = Path(__file__).resolve().parents[2]
    return (checkout if (checkout / "setup.py").exists() else Path.home()) / ".cache" / "a2tgpo" / "vllm"


# Must be in the environment before vllm is first imported.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine lives in this process: weights by reference
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ["DO_NOT_TRACK"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CACHE_ROOT", str(_cache_root()))
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
if not ON_GPU:
    # Asking for log-probs would compile C++ for 25 s, eager mode or not. torch._dynamo has read the variable
    # already if anything imported it before, hence both.
    os.environ["TORCH_COMPILE_DISABLE"] = "1"
    import torch._dynamo

    torch._dynamo.config.disable = True
    # That Triton is absent is no news on CPU.
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)

with environment_kept():
    import vllm

import vllm.v1.engine.core  # noqa: E402
from vllm import EngineArgs, SamplingParams  # noqa: E402
from vllm.device_allocator.cumem import CuMemAllocator  # noqa: E402
from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed  # noqa: E402
from vllm.model_executor.model_loader import register_model_loader  # noqa: E402
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader  # noqa: E402
from vllm.outputs import RequestOutput  # noqa: E402
from vllm.sampling_params import RequestOutputKind  # noqa: E402
from vllm.tokenizers.hf import get_cached_tokenizer  # noqa: E402
from vllm.v1.engine.llm_engine import LLMEngine  # noqa: E402
from vllm.v1.sample.logits_processor import LogitsProcessor as LogitsProcessorV1  # noqa: E402
from vllm.v1.worker.gpu.sample.logits_processor.interface import (  # noqa: E402
    LogitsProcessor as LogitsProcessorV2,
)

# Shutting down one engine would destroy the default process group, which is the trainer's.
_end_distributed = vllm.v1.engine.core.cleanup_dist_env_and_memory
vllm.v1.engine.core.cleanup_dist_env_and_memory = lambda *args, **kwargs: None

PARTS = ("weights", "kv_cache")
"""What sleeps and wakes, by vLLM's names."""
_NUM_TOKEN_IDS = "num_token_ids"


@register_model_loader(LOAD_FORMAT)
class WeightFilesLoader(DefaultModelLoader):
    """Reads a checkpoint's `weight_files` and nothing else; vLLM's own choice may take what lies beside them."""

    def _prepare_weights(
        self, model_name_or_path: str, *_: Any, **__: Any
    ) -> tuple[str, list[str], bool, str]:
        files = [str(file) for file in weight_files(model_name_or_path).values()]
        return model_name_or_path, files, True, INDEX_FILE


class MaskUnusedIds(LogitsProcessorV1, LogitsProcessorV2):
    """Never samples ids past the tokenizer's: vocabularies are padded, and the padding means nothing.

    One fill a step; vLLM's own `allowed_token_ids` costs a vocabulary-long list per request. Serves both of
    vLLM's model runners, whose constructors and `apply` differ in their further arguments only.
    """

    def __init__(self, vllm_config: Any, *_: Any):
        self._num_token_ids = vllm_config.additional_config[_NUM_TOKEN_IDS]

    def apply(self, logits: torch.Tensor, *_: Any) -> torch.Tensor:
        logits[:, self._num_token_ids :] = -torch.inf
        return logits

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        """No state: every request is masked alike."""


class VllmEngine:
    """One engine replica, or this rank's part of it.

    All ranks of the world construct it at the same point (it makes process groups) and close it before the
    world is destroyed. Where `config.tensor_parallel` > 1, the ranks of a replica make the same calls in the
    same order. An exception out of `step` ends the engine.

    Args:
        model_path: Hugging Face folder; its weights are loaded as version 0.
        config: the `rollout` section.
        model_dtype: number format where `config.dtype` is auto.
        max_model_len: longest sequence, tokens.
        seed: of the engine's own generator, which no request uses: they carry their seeds.
        replica_group: the ranks that share the engine, over the CPU, for `config.check_lockstep_every`; None: there
            is only this rank, or nothing is compared.

    Raises:
        ConfigError: one line; a missing model, a cache too small for one sequence, an unsupported model.
    """

    def __init__(
        self,
        model_path: str,
        *,
        config: RolloutConfig,
        model_dtype: str,
        max_model_len: int,
        seed: int,
        replica_group: dist.ProcessGroup | None = None,
    ):
        self.max_model_len = max_model_len
        self.dtype = model_dtype if config.dtype == "auto" else config.dtype
        self.weight_version = 0
        self._failure: str | None = None  # of a step; final
        self._weights_fault: str | None = None  # mended by a whole load
        self._asleep: set[str] = set()
        self._in_flight: set[str] = set()
        self._answers: dict[str, int] = {}  # request id -> tokens of the answer, for scorings in flight
        hf_config, tokenizer = read_model(model_path)
        self.num_token_ids = num_token_ids(tokenizer)
        self.vocab_size: int = hf_config.vocab_size
        self._tied = bool(hf_config.tie_word_embeddings)
        self._shapes = checkpoint_shapes(model_path, tied=self._tied)
        self._owns_process_group = not dist.is_initialized()
        arguments = engine_arguments(
            model_path, hf_config, config, dtype=self.dtype, max_model_len=self.max_model_len, seed=seed
        )
        if self.num_token_ids < self.vocab_size:
            arguments["logits_processors"] = [MaskUnusedIds]
            arguments["additional_config"] = {_NUM_TOKEN_IDS: self.num_token_ids}
        is_alone = ON_GPU or self._owns_process_group
        with host_state_kept(), contextlib.nullcontext() if is_alone else own_segments(_CPUSHMDistributed):
            try:
                self._engine = LLMEngine.from_engine_args(EngineArgs(**arguments))
            except ValueError as error:
                raise ConfigError(explain_refusal(error, max_model_len)) from error
        # The trainer's, by which it finds stop strings; its own choice may split texts otherwise (data/tokenizer.py).
        self._engine.renderer.tokenizer = get_cached_tokenizer(tokenizer)  # type: ignore[arg-type]
        self._engine.output_processor.tokenizer = self._engine.renderer.tokenizer
        client: Any = self._engine.engine_core  # of an engine in this process
        core = client.engine_core
        cap_cache_hits(core.scheduler.kv_cache_manager)
        abort_in_order(core)
        self._lockstep: Lockstep | None = None
        if replica_group is not None and config.check_lockstep_every:
            self._lockstep = Lockstep(core.scheduler, replica_group, every=config.check_lockstep_every)
        # vLLM has two model runners; its choice hangs on Triton, so on a GPU, and on VLLM_USE_V2_MODEL_RUNNER.
        self._has_second_runner: bool = self._engine.vllm_config.use_v2_model_runner

    @property
    def has_unfinished(self) -> bool:
        return self._engine.has_unfinished_requests()

    def submit(
        self,
        request_id: str,
        tokens: Sequence[int],
        *,
        max_tokens: int,
        seed: int | None,
        temperature: float,
        top_p: float,
        stop: Sequence[str],
        stop_tokens: Sequence[int] = (),
    ) -> None:
        """Queue a generation; its `EngineOutput` comes out of a later `step`.

        Args:
            request_id: unique among those in flight.
            tokens: the context.
            max_tokens: longest generation.
            seed: of this request's own generator; None only with temperature 0.
            temperature: of sampling and of the log-probs; 0 is greedy, with log-probs at temperature 1.
            top_p: nucleus threshold; log-probs are those of the truncated distribution.
            stop: texts that end the generation; they stay in it.
            stop_tokens: ids that end it, and stay in it, besides the end of sequence that the tokenizer and
                generation_config.json name. Nothing else of that file has an effect.

        Raises:
            ConfigError: if the context leaves no room for one token.
        """
        params = SamplingParams(
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            max_tokens=max_tokens,
            stop=list(stop),
            stop_token_ids=list(stop_tokens),
            include_stop_str_in_output=True,
            skip_special_tokens=False,
            spaces_between_special_tokens=False,
            logprobs=0,
            flat_logprobs=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self._add(request_id, list(tokens), params)

    def submit_score(self, request_id: str, prefix: Sequence[int], answer: Sequence[int]) -> None:
        """Queue a scoring of log p(answer | prefix); its `ScoreOutput` comes out of a later `step`.

        Log-probs are the model's own: temperature 1, the whole vocabulary.
        The prefix is taken from the cache as far as it is there. Prefix and answer together must leave room
        for one token (vLLM always generates one).
        """
        assert prefix and answer, "scoring needs a prefix and an answer"
        # A hit that reached the prefix's last token would leave the first answer token without a row.
        self._submit_prompt_logprobs(request_id, [*prefix, *answer], len(answer), len(prefix) - 1)

    def sequence_logprobs(self, tokens: Sequence[int]) -> list[float]:
        """log p of `tokens[1:]` by the model's own distribution, nothing taken from the cache; idle engines only."""
        assert not self.has_unfinished, "sequence_logprobs needs an idle engine"
        self._submit_prompt_logprobs("sequence", list(tokens), len(tokens) - 1, 0)
        outputs: list[EngineOutput | ScoreOutput] = []
        while not outputs:
            outputs = self.step()
        assert isinstance(outputs[0], ScoreOutput)
        return outputs[0].answer_logprobs

    def step(self) -> list[EngineOutput | ScoreOutput]:
        """One forward pass over what is scheduled; the requests that it finished.

        Raises:
            LockstepError: on all ranks of the engine, if they are out of step.
            RuntimeError: if the engine failed. Either way it cannot be used afterwards.
        """
        self._check_usable()
        try:
            outputs = self._engine.step()
            if self._lockstep is not None:
                self._lockstep.compare()
        except LockstepError as error:
            self._failure = str(error)
            raise
        except Exception as error:
            self._failure = f"a step failed with {type(error).__name__}: {_first_line(error)}"
            raise RuntimeError(f"the engine is lost: {self._failure}") from error
        return [self._finish(output) for output in outputs if output.finished]  # type: ignore[arg-type]

    def abort_all(self) -> None:
        """Drop every request in flight; nothing comes out for them."""
        self._engine.abort_request(sorted(self._in_flight))  # in the same order on all ranks of the engine
        self._in_flight.clear()
        self._answers.clear()

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], *, version: int) -> None:
        """Replace all weights; any order, though layer by layer needs the least memory.

        Args:
            weights: Hugging Face names and full, unsharded tensors of any float type; consumed lazily.
            version: remembered as `weight_version`.

        Raises:
            RuntimeError: unless the names and shapes are exactly those of the model. The engine is then
                unusable until a whole load succeeds.
        """
        assert not self.has_unfinished, "weights cannot be replaced while requests are in flight"
        assert "weights" not in self._asleep, "wake the weights before they are loaded"
        self._weights_fault = "its weights are incomplete: a refit did not finish"
        checked = checked_weights(weights, self._shapes, tied=self._tied)
        with torch.no_grad():
            rpc: Any = self._engine.collective_rpc
            rpc(reload_weights, args=(checked,))
        # Cached keys and values came from the old weights.
        if not self._engine.reset_prefix_cache():
            raise RuntimeError("the engine could not drop its prefix cache after a refit")
        self._weights_fault = None
        self.weight_version = version

    def sleep(self) -> None:
        """Give the memory of weights and cache back; both must be woken, and on a GPU the weights loaded."""
        assert not self.has_unfinished, "requests are in flight"
        assert not self._asleep, "the engine sleeps already"
        if ON_GPU:
            self._engine.sleep(level=2)
            self._weights_fault = "its weights were given back by sleep() and not loaded again"
        self._asleep = set(PARTS)

    @property
    def needs_weights(self) -> bool:
        """Generation needs a `load_weights` first, whatever the version."""
        return self._weights_fault is not None

    def is_on_card(self, part: str) -> bool:
        """Whether memory is taken for `part`, weights or kv_cache; on a GPU by the allocator's own account."""
        assert part in PARTS, part
        if not ON_GPU:
            return part not in self._asleep
        taken = CuMemAllocator.get_instance().pointer_to_data.values()
        return any(data.tag == part and not data.is_asleep for data in taken)

    def wake(self, part: str) -> None:
        """Take the memory of `part` again: weights, then kv_cache (the trainer's copies can go in between)."""
        assert part in PARTS, part
        if part not in self._asleep:
            return
        if ON_GPU:
            self._engine.wake_up(tags=[part])
        self._asleep.discard(part)

    def close(self) -> None:
        """Shut down. The trainer's process group stays; one that vLLM made for itself goes."""
        self._engine.engine_core.shutdown()
        del self._engine
        if self._owns_process_group:
            _end_distributed()

    def _check_usable(self) -> None:
        assert not self._asleep, f"the engine's {' and '.join(sorted(self._asleep))} sleep"
        fault = self._failure or self._weights_fault
        if fault is not None:
            raise RuntimeError(f"the engine cannot be used: {fault}")

    def _add(self, request_id: str, tokens: list[int], params: SamplingParams) -> None:
        self._check_usable()
        require(
            len(tokens) < self.max_model_len,
            f"length of the context of {request_id}",
            len(tokens),
            f"< {self.max_model_len} (data.max_prompt_tokens + rollout.max_response_tokens); raise one of them",
        )
        self._engine.add_request(request_id, {"prompt_token_ids": tokens}, params)
        self._in_flight.add(request_id)

    def _submit_prompt_logprobs(
        self, request_id: str, tokens: list[int], num_scored: int, max_hit: int
    ) -> None:
        if self._has_second_runner:
            # The first runs the output layer at the answer only, this one at all tokens of a pass unless told where.
            asked: dict[str, Any] = dict(
                prompt_logprob_token_ids=[[token] for token in tokens[-num_scored:]],
                prompt_logprob_start=len(tokens) - num_scored - 1,
            )
        else:
            asked = dict(prompt_logprobs=0, flat_logprobs=True)
        params = SamplingParams(
            temperature=0,
            max_tokens=1,
            # Rows of cached positions hold rubbish, which must not be decoded.
            detokenize=False,
            skip_reading_prefix_cache=False,
            extra_args={MAX_CACHE_HIT: max_hit},
            output_kind=RequestOutputKind.FINAL_ONLY,
            **asked,
        )
        self._add(request_id, tokens, params)
        self._answers[request_id] = num_scored

    def _finish(self, output: RequestOutput) -> EngineOutput | ScoreOutput:
        self._in_flight.discard(output.request_id)
        num_scored = self._answers.pop(output.request_id, None)
        if num_scored is None:
            return generation_output(output)
        return score_output(output, num_scored, is_second_runner=self._has_second_runner)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")[:300]
