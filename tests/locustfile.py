"""Load on a served model, by Locust: so many requests by users who ask again as soon as they are answered or refused.

    OPENAI_API_KEY=KEY locust -f tests/locustfile.py --headless --users 32 --spawn-rate 32 \\
        --host http://127.0.0.1:8000 --model aligned --requests 200

A request counts as `answered` with its own prompt echoed in every choice, as `refused` with status 429 and Retry-After.
Anything else is a failure, and then Locust's exit status is 1.
"""

from __future__ import annotations

import itertools
from typing import Any

from locust import FastHttpUser, events, task
from locust.exception import StopUser

NUMBERS = itertools.count()
DONE = itertools.count(1)


@events.init_command_line_parser.add_listener
def add_arguments(parser: Any) -> None:
    parser.add_argument("--model", default="aligned", help="name of the served model")
    parser.add_argument("--requests", type=int, default=200, help="requests of all users together")
    parser.add_argument("--max-tokens", type=int, default=2, help="tokens of an answer")
    parser.add_argument("--api-key", env_var="OPENAI_API_KEY", default="", is_secret=True, help="of the server, if any")


class Client(FastHttpUser):
    """Asks for one choice and for two by turns."""

    @task
    def ask(self) -> None:
        options: Any = self.environment.parsed_options
        number = next(NUMBERS)
        if number >= options.requests:
            raise StopUser
        prompt = f"{number} "
        body = {"model": options.model, "prompt": prompt, "max_tokens": options.max_tokens, "n": 1 + number % 2}
        headers = {"Authorization": f"Bearer {options.api_key}"}
        asked = self.client.post(
            "/v1/completions", json={**body, "echo": True}, headers=headers, name="answered", catch_response=True
        )
        with asked as response:
            problem = problem_of(response, prompt, num_choices=1 + number % 2)
            if problem:
                response.failure(problem)
            elif response.status_code == 429:
                response.request_meta["name"] = "refused"
                response.success()
        if next(DONE) == options.requests and self.environment.runner:
            self.environment.runner.quit()


def problem_of(response: Any, prompt: str, *, num_choices: int) -> str | None:
    """What is wrong with an answer or a refusal."""
    if response.status_code == 429:
        return None if int(response.headers.get("retry-after") or 0) > 0 else "429 without Retry-After"
    if response.status_code != 200:
        return f"status {response.status_code}: {response.text}"
    texts = [choice["text"] for choice in response.json()["choices"]]
    if len(texts) != num_choices or not all(text.startswith(prompt) for text in texts):
        return f"asked for {num_choices} of {prompt!r}, got {texts}"
    return None
