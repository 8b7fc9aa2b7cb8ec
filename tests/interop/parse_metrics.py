"""Parse metrics on stdin with prometheus_client, and print their samples as JSON.

usage: parse_metrics.py text|openmetrics
It runs in the venv of the interop tests, and prints [name, labels, value] for each sample.
"""

from __future__ import annotations

import json
import sys

from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

parse = {"text": parse_text, "openmetrics": parse_openmetrics}[sys.argv[1]]
samples = [sample for family in parse(sys.stdin.read()) for sample in family.samples]
json.dump([[sample.name, sample.labels, sample.value] for sample in samples], sys.stdout)
