"""The parts of a model by role, whatever its family calls them.

A role is one word for what a weight does: `q k v o qkv` in attention, `gate up down` in the MLP, `norm`, `embed`,
`head`, `conv`, `linear` for the rest. Blocks are numbered by depth over the whole model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ftrecipes.errors import UserError
from ftrecipes.stacking import GROUPED

ROLES = [
    ("qkv", r"(c_attn|qkv|qkv_proj|query_key_value|in_proj|Wqkv)$"),
    ("q", r"(q_proj|query|q_lin|to_q|wq|(SelfAttention|EncDecAttention|attn\w*|attention)\.q)$"),
    ("k", r"(k_proj|key|k_lin|to_k|wk|(SelfAttention|EncDecAttention|attn\w*|attention)\.k)$"),
    ("v", r"(v_proj|value|v_lin|to_v|(SelfAttention|EncDecAttention|attn\w*|attention)\.v)$"),
    (
        "o",
        r"(o_proj|out_proj|out_lin|to_out\.0|attention\.output\.dense|attn\.c_proj|(self_attn|attention)\.dense|(SelfAttention|EncDecAttention)\.o)$",
    ),
    ("gate", r"(gate_proj|wi_0)$"),
    ("up", r"(up_proj|fc1|c_fc|lin1|intermediate\.dense|wi|wi_1|net\.0\.proj|fc_in|dense_h_to_4h)$"),
    ("down", r"(down_proj|fc2|lin2|mlp\.c_proj|DenseReluDense\.wo|net\.2|fc_out|dense_4h_to_h|\d+\.output\.dense)$"),
    ("head", r"(^|\.)(lm_head|embed_out|classifier(\.\w+)?|score|qa_outputs|head|visual_projection|text_projection)$"),
    ("embed", r"(embed_tokens|wte|word_embeddings|shared|embeddings?|wpe|position_embeddings?|patch_embeddings\.projection)$"),
]
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
KINDS = (nn.Linear, *CONVS, nn.Embedding)


@dataclass(frozen=True)
class Part:
    """One module with a weight. `block` is its depth, None outside the blocks."""

    name: str
    module: nn.Module
    role: str
    block: int | None

    @property
    def weight(self) -> nn.Parameter:
        return self.module.weight  # type: ignore[return-value]


class Anatomy:
    """Parts and blocks of a model; `roles` maps further module names (regular expressions) to roles, `blocks` names them by depth."""

    def __init__(self, model: nn.Module, roles: Iterable[tuple[str, str]] = (), blocks: Sequence[str] | None = None) -> None:
        self.model = model
        self.blocks = find_blocks(model) if blocks is None else [(name, model.get_submodule(name)) for name in blocks]
        depth = {name: index for index, (name, _) in enumerate(self.blocks)}
        table = [(role, re.compile(pattern)) for role, pattern in (*roles, *ROLES)]
        self.parts = [
            Part(name, module, _role(name, module, table), _depth(name, depth))
            for name, module in model.named_modules()
            if isinstance(getattr(module, "weight", None), nn.Parameter)
        ]

    def select(self, targets: Sequence[str], blocks: Any = "all") -> list[Part]:
        """The parts that targets name: roles, `all-linear`, `attention`, `mlp`, or `re:…` on module names.

        blocks: `all`, `first-N`, `last-N`, or a list of depths; it concerns parts that lie in blocks.
        """
        wanted = self.depths(blocks)
        roles: set[str] = set()
        patterns = []
        for target in targets:
            if target.startswith("re:"):
                patterns.append(re.compile(target[3:]))
            else:
                roles |= GROUPED.get(target, {target})
        out = []
        for part in self.parts:
            if part.block is not None and part.block not in wanted:
                continue
            stray = bool(self.blocks) and part.block is None and part.role in GROUPED["all-linear"]
            by_role = part.role in roles and not stray
            if by_role or any(p.search(part.name) for p in patterns):
                out.append(part)
        return out

    def depths(self, blocks: Any) -> set[int]:
        """The block numbers that a `blocks` setting names."""
        count = len(self.blocks)
        if blocks in ("all", None):
            return set(range(count))
        if isinstance(blocks, str) and (m := re.fullmatch(r"(first|last)-(\d+)", blocks)):
            n = min(int(m.group(2)), count)
            return set(range(n)) if m.group(1) == "first" else set(range(count - n, count))
        chosen = {int(b) % count if count else 0 for b in ([blocks] if isinstance(blocks, int) else blocks)}
        too_deep = [b for b in ([blocks] if isinstance(blocks, int) else blocks) if not -count <= int(b) < count]
        if too_deep:
            raise UserError(f"blocks={blocks}: the model has {count} blocks, 0 to {count - 1}")
        return chosen

    def outside(self) -> list[tuple[str, nn.Parameter]]:
        """Named parameters that lie in no block (embedding, final norm, head)."""
        prefixes = tuple(f"{name}." for name, _ in self.blocks)
        return [(n, p) for n, p in self.model.named_parameters() if not n.startswith(prefixes)]


def find_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The repeated blocks in order of depth: lists of same-class modules that hold the matrices.

    Of nested lists the outermost counts (a block's own experts or sub-layers are not blocks).
    """
    lists = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 0:
            kinds = {type(child) for child in module}
            heavy = all(any(p.dim() >= 2 for p in child.parameters()) for child in module)
            if len(kinds) == 1 and heavy and not isinstance(module[0], KINDS):
                lists.append((name, module))
    outermost = [(n, m) for n, m in lists if not any(n.startswith(f"{other}.") for other, _ in lists)]
    return [(f"{name}.{index}", child) for name, module in outermost for index, child in enumerate(module)]


def _depth(name: str, depth: dict[str, int]) -> int | None:
    for prefix, index in depth.items():
        if name.startswith(f"{prefix}."):
            return index
    return None


def _role(name: str, module: nn.Module, table: list[tuple[str, re.Pattern[str]]]) -> str:
    if isinstance(module, nn.Embedding):
        return "embed"
    if module.weight.dim() == 1:  # type: ignore[union-attr, operator]
        return "norm"
    for role, pattern in table:
        if pattern.search(name):
            return role
    return "conv" if isinstance(module, CONVS) else "linear"
