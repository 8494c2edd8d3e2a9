"""The model as lm-eval wants it: its abstract `LM`, answered by a `Respondent`. Imports lm-eval.

lm-eval reads no entry points, so its own command cannot find this class: pass an instance to
`lm_eval.simple_evaluate(model=...)`, or use `archbench lm-eval`.
"""

from __future__ import annotations

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from tqdm import tqdm

from archbench.integrations.lm_eval_answers import Respondent, writing


class ArchbenchLM(LM):
    """Requests come as texts and are answered in their order."""

    def __init__(self, respondent: Respondent) -> None:
        super().__init__()
        self.respondent = respondent

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Raises UnsupportedError for a model without likelihood."""
        asked = [(request.args[0], request.args[1]) for request in requests]
        with tqdm(total=len(asked), desc="loglikelihood", disable=None) as bar:
            return [
                (found.log_likelihood, found.greedy) for found in self.respondent.log_likelihoods(asked, bar.update)
            ]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Raises UnsupportedError for a model without likelihood."""
        return self.respondent.rolling([request.args[0] for request in requests])

    def generate_until(self, requests: list[Instance]) -> list[str]:
        answers = []
        for index, request in enumerate(tqdm(requests, desc="generate_until", disable=None)):
            prompt, options = request.args
            answers.append(self.respondent.write(prompt, writing(options, request.task_name or "lm-eval"), index))
        return answers
