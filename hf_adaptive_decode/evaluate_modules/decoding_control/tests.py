"""What the metric gives for inputs that can be worked out by hand; knows nothing of the metric."""

test_cases = [
    {
        "predictions": [{"temperature": [0.25, 0.25], "top_p": [0.75]}, {"temperature": [0.25], "top_p": [0.5]}],
        "references": [{"temperature": [0.5], "top_p": [0.75]}, {"temperature": [0.25, 0.75], "top_p": [1.0]}],
        "direction": "low",
        "result": {
            "temperature_baseline": 0.5,
            "temperature_command": 0.25,
            "temperature_difference": -0.25,
            "temperature_difference_low": -0.25,
            "temperature_difference_high": -0.25,
            "temperature_consistency": 1.0,
            "top_p_baseline": 0.875,
            "top_p_command": 0.625,
            "top_p_difference": -0.25,
            "top_p_difference_low": -0.5,
            "top_p_difference_high": 0.0,
            "top_p_consistency": 0.5,
            "prompts": 2,
        },
    },
]
