"""Models that come with us: `demo` as it stands, `smol-llava` to be assembled from packages."""
