"""Orders the jobs: the highest response ratio goes first.

That is the time since a request came, over the UNet's time that it still needs (P. Brinch Hansen, "Short-term
scheduling in multiprogramming systems", 1971). Short requests go before long ones, long ones wait the less the longer
they have waited, and what is nearly done gets out of the way. No job falls far behind an equal share of the time.
"""

import math

from denoising_job import Job


def priority(job: Job, now: float) -> tuple[bool, float]:
    """Return what jobs are compared by; the greatest goes first.

    Returns:
        Whether an equal share of the time would have given it more than it has had, by all that it needs: then it goes
        first, so that among n it ends within 2 n times its own time. And its response ratio, infinite before its first
        forward.
    """
    needed_s = _estimated_s(job)
    remaining_s = needed_s - job.used_s
    ratio = (now - job.arrived_s) / remaining_s if remaining_s > 0 else math.inf
    return job.fair_share_s - job.used_s > needed_s, ratio


def _estimated_s(job: Job) -> float:
    """Return the UNet's time for all of a job, from what it has had so far; 0 before its first forward."""
    return job.used_s / job.share_done if job.share_done else 0.0
