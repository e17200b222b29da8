"""Ratios against named rivals, on the same work in one run: `python -m jobs.bench <what>`; see BENCHES."""

import sys
from typing import Any

from jobs import (
    bench_attention,
    bench_guidance,
    bench_heads,
    bench_memory,
    bench_panel,
    bench_rollout,
    bench_sampler,
    bench_scale,
    bench_sdxl,
    bench_serve,
    bench_transport,
)
from jobs.config import run_job

BENCHES: dict[str, Any] = {
    "attention": (bench_attention.main, bench_attention.AttentionBenchConfig),
    "guidance": (bench_guidance.main, bench_guidance.GuidanceBenchConfig),
    "heads": (bench_heads.main, bench_heads.HeadsBenchConfig),
    "panel": (bench_panel.main, bench_panel.PanelBenchConfig),
    "sampler": (bench_sampler.main, bench_sampler.SamplerBenchConfig),
    "rollout": (bench_rollout.main, bench_rollout.RolloutBenchConfig),
    "serve": (bench_serve.main, bench_serve.ServeBenchConfig),
    "memory": (bench_memory.main, bench_memory.MemoryBenchConfig),
    "scale": (bench_scale.main, bench_scale.ScaleBenchConfig),
    "sdxl": (bench_sdxl.main, bench_sdxl.SdxlBenchConfig),
    "transport": (bench_transport.main, bench_transport.TransportBenchConfig),
}

if __name__ == "__main__":
    what = sys.argv[1] if len(sys.argv) > 1 else ""
    if what not in BENCHES:
        sys.stderr.write(f"error: {what or 'nothing'} is not a benchmark: give one of {', '.join(BENCHES)}\n")
        sys.exit(2)
    main, model = BENCHES[what]
    run_job(main, model, sys.argv[2:])
