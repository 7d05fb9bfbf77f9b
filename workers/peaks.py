# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.6,<2.14"]
# ///
"""The worker that measures the device itself instead of a precision, as a reference for every row.

It starts and communicates like the others, in a separate process so that nothing of it is left on the device
when they measure. A data sheet is no substitute: it says what a chip can do at its boost clock, not what this
one does under its power limit, in this host, with this torch.
"""

from schemas.job import Job, decode_job
from workers.protocol.channel import Channel
from workers.protocol.errors import describe_failure


def main() -> None:
    """Read a Job for its device, measure, and send Peaks or Failed."""
    channel = Channel.claim_stdio()
    try:
        measure(decode_job(channel.answers.readline()), channel)
    except Exception as error:
        channel.send(describe_failure(error))
        raise  # for the log and the exit status


def measure(job: Job, channel: Channel) -> None:
    """Everything from the imports to Peaks."""
    channel.enter("start")
    from workers.generation.device import open_device
    from workers.harness.peak_rates import measure_peaks
    from workers.harness.startup import import_packages, ready_frame

    versions = import_packages(job.packages)
    channel.enter("context")
    device = open_device(job)
    channel.send(ready_frame(device, versions))
    channel.send(measure_peaks(device))


if __name__ == "__main__":
    main()
