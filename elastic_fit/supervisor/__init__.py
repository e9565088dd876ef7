"""What a run is, and how it stays true. Knows neither Lightning nor torch nor the other rooms."""
