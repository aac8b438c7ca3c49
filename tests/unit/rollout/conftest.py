"""One real engine on the taught tiny model, shared by the tests of this folder."""

import pytest
import torch
from scripted_search import ScriptedSearch
from taught import taught_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from a2tgpo.config.rollout import RolloutConfig

MAX_MODEL_LEN = 1024


@pytest.fixture(scope="package")
def taught_path():
    return taught_folder()


@pytest.fixture(scope="package")
def tokenizer(taught_path):
    return AutoTokenizer.from_pretrained(taught_path)


@pytest.fixture(scope="package")
def reference(taught_path):
    """Return a function that maps tokens to the log-probs of all but the first, by the same model in transformers.

    Log-probs are those of softmax(logits / temperature) over the first `num_ids` ids, by default over all ids.
    """
    model = AutoModelForCausalLM.from_pretrained(taught_path, dtype=torch.float32).eval()

    def logprobs(tokens, *, num_ids=None, temperature=1.0):
        with torch.no_grad():
            logits = (model(torch.tensor([tokens])).logits[0, :, :num_ids] / temperature).log_softmax(-1)
        return logits[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist()

    return logprobs


@pytest.fixture(scope="package")
def engine_config():
    return RolloutConfig(kv_cache_gib=0.1, max_concurrent=16, dtype="float32")


@pytest.fixture(scope="package")
def engine(taught_path, engine_config):
    from a2tgpo.rollout.vllm_engine import VllmEngine

    engine = VllmEngine(
        taught_path, config=engine_config, model_dtype="float32", max_model_len=MAX_MODEL_LEN, seed=0
    )
    yield engine
    engine.close()


@pytest.fixture
def search():
    return ScriptedSearch()
