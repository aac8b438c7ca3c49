"""An engine without vLLM that writes the texts of a test's script."""

from a2tgpo.rollout.engine_output import EngineOutput, ScoreOutput


class ScriptedEngine:
    """Writes the next text of a script for each turn.

    Args:
        script: maps the text of a context to the next turn's text, with its end token.
    """

    max_model_len = 4096

    def __init__(self, tokenizer, script):
        self._tokenizer = tokenizer
        self._script = script
        self._outputs = []
        self.scored = []
        """The tokens before each scored answer."""

    @property
    def has_unfinished(self):
        return bool(self._outputs)

    def submit(self, request_id, tokens, *, max_tokens, stop=(), **_):
        text = self._script(self._tokenizer.decode(list(tokens)))
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        is_long = len(ids) > max_tokens
        ids = ids[:max_tokens]
        output = EngineOutput(
            request_id=request_id,
            tokens=ids,
            logprobs=[-0.5] * len(ids),
            text=self._tokenizer.decode(ids),
            finish_reason="length" if is_long else "stop",
            stop_string=next((end for end in stop if end in text), None),
            num_prompt_tokens=len(tokens),
            num_cached_tokens=0,
        )
        self._outputs.append(output)

    def submit_score(self, request_id, prefix, answer):
        self.scored.append(list(prefix))
        counts = dict(num_prompt_tokens=len(prefix), num_cached_tokens=0)
        self._outputs.append(
            ScoreOutput(request_id=request_id, answer_logprobs=[-1.0] * len(answer), **counts)
        )

    def step(self):
        outputs, self._outputs = self._outputs, []
        return outputs

    def abort_all(self):
        self._outputs.clear()
