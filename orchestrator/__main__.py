"""`python -m orchestrator`: the command qbench-orchestrate, from a checkout that is not installed."""

from orchestrator.cli.orchestrate import main

main()
