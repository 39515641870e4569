"""The methods: one file a paper, in folders by where it acts."""
