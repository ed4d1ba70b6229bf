"""What the metric gives for inputs that can be worked out by hand; knows nothing of the metric."""

test_cases = [
    {
        "predictions": ["so \\boxed{0.5}", "so \\boxed{3}"],
        "references": ["\\frac{1}{2}", "2"],
        "result": {"accuracy": 0.5, "scores": [1.0, 0.0]},
    },
    {"predictions": ["#### 1,000"], "references": ["1000"], "result": {"accuracy": 1.0, "scores": [1.0]}},
]
