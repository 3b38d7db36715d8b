"""Ranking: the greedy search, its stacked passes, and the other strategies."""

from __future__ import annotations

from . import Part

PART = Part(
    "ranking",
    "dqa_plugins/ranking",
    *(f"ranking/test_{name}.py" for name in ("rank_channels", "search", "strategies", "state", "table")),
)
add = PART.add

add("lowest score first", "scoring.py", "(-self.scores[c], losses[c], c)", "(self.scores[c], losses[c], c)")
add("ties to the higher loss", "scoring.py", "(-self.scores[c], losses[c], c)", "(-self.scores[c], -losses[c], c)")
add("ties to the higher index", "scoring.py", "(-self.scores[c], losses[c], c)", "(-self.scores[c], losses[c], -c)")
add("strict asks the loss", "scoring.py", "if strict or self.losses is None", "if self.losses is None")
add(
    "batches of any size weigh alike",
    "scoring.py",
    "        self._count += len(scores)\n",
    "        self._count += 1\n",
)
add(
    "sums depend on their order",
    "scoring.py",
    "return math.fsum(self._scores) / self._count",
    "return sum(self._scores) / self._count",
    "ranking/test_strategies.py",
)
add("NaN scores rank", "scoring.py", "        if not torch.isfinite(values).all():", "        if False:")
add("earlier layers are float", "greedy.py", "        self.search.quantize_before(index)\n", "")
add(
    "earlier layers have no channel left out",
    "greedy.py",
    "site.left_out = order[0] if order else None",
    "site.left_out = None",
)
add(
    "earlier layers leave the worst out",
    "greedy.py",
    "site.left_out = order[0] if order",
    "site.left_out = order[-1] if order",
)
add(
    "the checkpoint is not used",
    "greedy.py",
    "if site.name not in checkpoint.done:",
    "if True:",
    "ranking/test_rank_channels.py",
)
add(
    "stacked passes are trusted blindly",
    "stacking.py",
    "if losses is None or not output <= TRUSTED * float(single.abs().max()):",
    "if losses is None:",
    "ranking/test_search.py",
)
add(
    "close outputs are not doubted",
    "stacking.py",
    "(gap <= SAFETY * deviation.output).cpu()",
    "(gap < 0).cpu()",
    "ranking/test_search.py",
)
add(
    "targets of other samples",
    "stacking.py",
    "self.prefix.targets[rows.to(self.prefix.targets.device)]",
    "self.prefix.targets[rows.to(self.prefix.targets.device).flip(0)]",
    "ranking/test_search.py",
)
add(
    "prefixes are shared, not copied",
    "stacking.py",
    "values = copy.deepcopy(prefix.values)  #",
    "values = prefix.values  #",
    "ranking/test_search.py",
)
add(
    "dependent samples are stacked",
    "stacking.py",
    "value.ndim == 0 or len(value) != self.prefix.size",
    "False",
    "ranking/test_search.py",
)
add("random draws are the same everywhere", "strategies.py", '{seed}:{name}"', '{seed}"', "ranking/test_strategies.py")
add(
    "errors of one batch",
    "strategies.py",
    "totals[sites[site].name] += squared",
    "totals[sites[site].name] = squared",
    "ranking/test_strategies.py",
)
