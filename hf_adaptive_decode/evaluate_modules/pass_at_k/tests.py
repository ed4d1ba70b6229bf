"""What the metric gives for inputs that can be worked out by hand; knows nothing of the metric."""

test_cases = [
    {
        "predictions": [[1.0, 0.0], [0.0, 0.0]],
        "k": [1, 2],
        "result": {
            "pass@1": 0.25,
            "pass@1_low": 0.0,
            "pass@1_high": 0.5,
            "pass@2": 0.5,
            "pass@2_low": 0.0,
            "pass@2_high": 1.0,
            "problems": 2,
        },
    },
    {
        "predictions": [4, 4],
        "samples": 4,
        "result": {"pass@1": 1.0, "pass@1_low": 1.0, "pass@1_high": 1.0, "problems": 2},
    },
]
