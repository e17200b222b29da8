"""What an answer took, in the headers of the answer."""

from actors.serving.messages import Work


def work_headers(work: Work) -> dict[str, str]:
    """Return the headers that say which model answered, and what it took; times are in milliseconds."""
    return {
        "x-model-version": work.version,
        "x-queue-ms": f"{work.queued_s * 1000:.3f}",
        "x-compute-ms": f"{work.compute_s * 1000:.3f}",
        "x-batch-size": f"{work.batch_size:g}",
        "x-retries": str(work.retries),
        "x-replica": work.replica,
    }
