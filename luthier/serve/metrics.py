"""What the server counts, in the text format of Prometheus."""

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from luthier.serve.admission import Admission

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Histogram:
    """How many observations were at most as large as each border."""

    def __init__(self, borders: tuple[float, ...] = _SECONDS) -> None:
        self.borders = borders
        self.counts = [0] * len(borders)
        self.count, self.sum = 0, 0.0

    def observe(self, value: float) -> None:
        self.count += 1
        self.sum += value
        for index, border in enumerate(self.borders):
            self.counts[index] += value <= border


class Metrics:
    """Since the start of the server. For one thread."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        """(route, status) -> requests."""
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self.canceled = 0
        self.seconds = Histogram()
        """Of a whole request."""
        self.first_token_seconds = Histogram()

    def text(self, admission: "Admission", is_ready: bool) -> str:
        lines: list[str] = []
        number("luthier_requests_running", "gauge", "Answers that are generated now.", admission.num_running, lines)
        number("luthier_requests_waiting", "gauge", "Answers that wait for their turn.", admission.num_waiting, lines)
        number("luthier_max_concurrent", "gauge", "MAX_CONCURRENT.", admission.max_concurrent, lines)
        number("luthier_ready", "gauge", "1 once the model answers.", int(is_ready), lines)
        number("luthier_prompt_tokens_total", "counter", "Tokens of prompts.", self.prompt_tokens, lines)
        number("luthier_generated_tokens_total", "counter", "Generated tokens.", self.generated_tokens, lines)
        number("luthier_answers_canceled_total", "counter", "Answers whose client was gone.", self.canceled, lines)
        lines += [
            "# HELP luthier_requests_total Requests, by route and status.",
            "# TYPE luthier_requests_total counter",
        ]
        lines += [
            f'luthier_requests_total{{route="{route}",status="{status}"}} {count}'
            for (route, status), count in sorted(self.requests.items())
        ]
        histogram("luthier_request_seconds", "Time of a request.", self.seconds, lines)
        histogram("luthier_first_token_seconds", "Time to the first token.", self.first_token_seconds, lines)
        return "\n".join(lines) + "\n"


def number(name: str, kind: str, help_text: str, value: float, lines: list[str]) -> None:
    lines += [f"# HELP {name} {help_text}", f"# TYPE {name} {kind}", f"{name} {value}"]


def histogram(name: str, help_text: str, values: Histogram, lines: list[str]) -> None:
    lines += [f"# HELP {name} {help_text}", f"# TYPE {name} histogram"]
    lines += [f'{name}_bucket{{le="{b}"}} {n}' for b, n in zip(values.borders, values.counts, strict=True)]
    lines += [f'{name}_bucket{{le="+Inf"}} {values.count}', f"{name}_sum {values.sum}", f"{name}_count {values.count}"]
