"""The storage node: keeps pieces and orders; knows neither whose they are nor what they hold."""
