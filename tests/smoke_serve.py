"""Drives a running server with the unmodified openai client: the base and each demo adapter, plain and streamed.

    python tests/smoke_serve.py http://127.0.0.1:8000 [--log SERVER_LOG] [--wait SECONDS]

Exits non-zero with the reason when anything a newcomer would try does not work.
"""

from __future__ import annotations

import argparse
import json
import time
import urllib.error
import urllib.request
from pathlib import Path

import openai


def wait_until_ready(url: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(f"{url}/health/ready", timeout=2) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            pass
        if time.monotonic() > deadline:
            raise SystemExit(f"server at {url} not ready after {seconds:.0f} s")
        time.sleep(0.2)


def say(client: openai.OpenAI, model: str, prompt: str) -> str:
    messages = [{"role": "user", "content": prompt}]
    plain = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=64)
    text = plain.choices[0].message.content
    stream = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=64, stream=True)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert text, f"{model} answered nothing"
    assert streamed == text, f"{model}: streamed {streamed!r} but answered {text!r}"
    return text


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("url")
    arguments.add_argument("--log", type=Path)
    arguments.add_argument("--wait", type=float, default=120.0)
    given = arguments.parse_args()
    wait_until_ready(given.url, given.wait)
    client = openai.OpenAI(base_url=f"{given.url}/v1", api_key="none", max_retries=0)
    models = {model.id: model for model in client.models.list()}
    adapters = [name for name, model in models.items() if getattr(model, "parent", None)]
    assert len(adapters) >= 3, f"three demo adapters expected, found {adapters}"
    prompt = "What do cows eat?"
    answers = {name: say(client, name, prompt) for name in models}
    assert len(set(answers.values())) == len(answers), f"adapters do not change the answer: {answers}"
    assert answers["shout"].upper() == answers["shout"], answers["shout"]
    json.loads(answers["json"])
    try:
        say(client, "no-such-model", prompt)
    except openai.NotFoundError as error:
        if error.code != "model_not_found":
            raise SystemExit(f"an unknown model answered with code {error.code!r}") from error
    else:
        raise SystemExit("an unknown model was answered")
    if given.log:
        curls = [line for line in given.log.read_text().splitlines() if "curl " in line]
        assert len(curls) >= 3, f"three curl lines expected in the server's output, found {curls}"
    for name, answer in answers.items():
        print(f"{name:>12}: {answer}")
    print("smoke: ok")


if __name__ == "__main__":
    main()
