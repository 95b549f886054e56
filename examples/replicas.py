"""Replicas of the server of serve.py by Ray Serve: each has a model, a manager and a queue of its own.

    python examples/replicas.py --model HuggingFaceTB/SmolLM2-135M-Instruct --adapters three-prompts

It takes serve.py's options and needs `pip install "ray[serve]"`; docs/serving.md says what was tried.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from pathlib import Path
from types import ModuleType

from fastapi import FastAPI

SCRIPT = Path(__file__).resolve().with_name("serve.py")


def script() -> ModuleType:
    """The server's module, under a name of its own: `serve` is Ray's."""
    sys.path.insert(0, str(SCRIPT.parent))  # for the modules beside it
    spec = importlib.util.spec_from_file_location("ptv2_serve", SCRIPT)
    sys.modules["ptv2_serve"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def options_of() -> argparse.Namespace:
    return script().options_of()


if __name__ == "__main__":
    from ray import serve

    options = options_of()

    def build() -> FastAPI:
        return script().app_of(options)  # in the replica

    # On a GPU {"num_gpus": 1}.
    settings = {"num_replicas": 2, "max_ongoing_requests": options.max_queue, "ray_actor_options": {"num_cpus": 1}}
    deployment = serve.deployment(**settings)(serve.ingress(build)())
    serve.start(http_options={"host": options.host, "port": options.port})
    serve.run(deployment.bind(), name="ptv2", route_prefix="/")
    while True:
        time.sleep(10)
