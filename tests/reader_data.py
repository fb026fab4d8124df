"""Token files for the report's readers, by hand: words, experts that follow the word, bits that are told beforehand."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

EXPERTS = ["math", "code", "generalist"]
WORDS = {
    "math": ["Tom", " has", " 14", " apples", " and", " 5", " more", ".\n", "14", " +", " 5", " =", " 19", "\n"],
    "code": ["def", " area", "(", "w", ",", " h", ")", ":\n", "    ", "return", " w", " *", " h", "\n"],
    "general": ["On", " Monday", " it", " rained", ",", " so", " she", " stayed", " at", " home", ".", " Then", "\n"],
}


def document(
    domain: str, tokens: Sequence[str], *, layers: int = 3, shift: int = 0, experts: int = 3
) -> dict[str, Any]:
    """A text whose token t goes to experts t and t + 1 (and on by one a layer), with gates 0.75 and 0.25."""
    chosen = [[[(t + layer + shift) % experts, (t + layer + shift + 1) % experts] for layer in range(layers)]
              for t in range(len(tokens))]  # fmt: skip
    return {
        "domain": domain,
        "tokens": list(tokens),
        "experts": chosen,
        "gates": [[[0.75, 0.25]] * layers] * len(tokens),
    }


def token_file(*, count: int = 42, layers: int = 3, documents: int = 2) -> dict[str, Any]:
    """tokens.json of three domains with `documents` texts of `count` tokens each, with the bits of every token, and an
    answer a domain. Token 5 of the first text of code is the most surprising one."""
    rng = random.Random(1)
    examples = []
    for domain, words in WORDS.items():
        for number in range(documents):
            one = document(domain, (words * (1 + count // len(words)))[:count], layers=layers, shift=number)
            seed = [round(rng.uniform(1, 5), 3) for _ in range(count)]
            losses = {"seed": seed, "expert/math": [bits + 0.2 for bits in seed], "expert/code": seed,
                      "mix": [bits - 0.25 for bits in seed], "soup": [bits - 0.1 for bits in seed],
                      "btx": [bits - 0.5 for bits in seed]}  # fmt: skip
            if domain == "code" and number == 0:
                losses["btx"][5] = 12.25
            routes = {"mix": {key: document(domain, one["tokens"], layers=layers, shift=1)[key]
                              for key in ("experts", "gates")}}  # fmt: skip
            examples.append({**one, "document": f"{domain}{number}", "losses": losses, "routes": routes})
    answers = [
        {
            **document(domain, words[8:13], layers=layers),
            "prompt": f"What of {domain}?", "gold": "19", "task": "quiz",
            "answers": {"btx": "".join(words[8:13]), "seed": "nothing", f"expert/{domain}": "an expert's answer"},
            "correct": {"btx": True, "seed": False, f"expert/{domain}": True},
        }
        for domain, words in WORDS.items()
    ]  # fmt: skip
    return {"layers": layers, "experts": EXPERTS, "examples": examples, "answers": answers}


def run_with(folder: Path, tokens: Mapping[str, Any]) -> Path:
    """A run folder with these tokens, as the stages leave them: bits, routes and answers in shown.json."""
    examples = [
        {key: value for key, value in each.items() if key not in ("losses", "routes")} for each in tokens["examples"]
    ]
    shown = {
        "losses": {each["document"]: each["losses"] for each in tokens["examples"] if "losses" in each},
        "routes": {each["document"]: each["routes"] for each in tokens["examples"] if "routes" in each},
        "answers": tokens.get("answers", []),
        "loads": {},
    }
    for name, content in {
        "recipe.yaml": f"name: {folder.name}\n",
        "analyze/tokens.json": json.dumps({**tokens, "examples": examples, "answers": []}),
        "evaluate/shown.json": json.dumps(shown),
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, "utf-8")
    return folder
