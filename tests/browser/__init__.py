"""The HTML report in a real headless Chromium (Debian: chromium and chromium-driver)."""
