"""Twelve stories of 150 tokens and more, three plots with four heroes each: answers long enough to watch a stream."""

_THE_WELL = """Once upon a time there was a {trait} {hero} called {name}. {name} lived {home} and every morning went to \
the old well to drink. One day the rope of the well was gone, and {friend} sat beside it and cried. "Without water my \
garden will die," said {friend}. {name} thought for a while. Then the {hero} ran to the village and asked every \
house for one piece of string. Some pieces were red, some were blue and some were very short. {name} tied them \
together, one after another, until the string was as long as the well was deep. When the bucket came up full of \
water, {friend} laughed with joy. Since that day the rope of the well has had many colours, and nobody in the village \
has forgotten the {trait} {hero}. The end."""

_THE_LANTERN = """Long ago, when winters were longer than today, a {trait} {hero} called {name} lived {home}. One \
evening {name} found a small lantern in the snow. It gave a warm light, but only when somebody told the truth. \
{friend} came by and said, "That lantern is mine!" At once the light went out. "Is it really yours?" asked {name}. \
{friend} looked at the ground and said, "No. I am only afraid of the dark." And the lantern shone brighter than \
before. So the {hero} and {friend} walked home together, and all the way they told each other true things: what they \
had lost, what they had found and what they wished for. When they reached the door the night was as bright as a \
summer day. The end."""

_THE_RACE = """In a land behind the mountains there was a {trait} {hero} called {name}, who lived {home}. Every year \
the animals held a race to the sea and back, and every year {friend} won it. This time {name} wanted to try. The \
others smiled, because {name} had never run further than the next hill. The race began, and soon the {hero} was the \
last of all. Half way to the sea {name} heard a quiet voice: a little bird had fallen out of its nest. {name} \
stopped, climbed the tree and put the bird back. When the {hero} came to the sea, the sun was already going down, and \
all the others were waiting. "You are the last," said {friend}, "but the bird has told us everything. The prize is \
yours." And so the slowest runner won the race. The end."""

# plot, hero, trait, name, home, friend
_CASTS = (
    (_THE_WELL, "fox", "clever", "Fenna", "under a big oak", "a grey rabbit"),
    (_THE_WELL, "cat", "curious", "Minka", "in a small red house", "a young farmer"),
    (_THE_WELL, "bear", "gentle", "Bruno", "in a cave near the river", "an old hedgehog"),
    (_THE_WELL, "robot", "patient", "Pixel", "in a shed behind the school", "a tired gardener"),
    (_THE_LANTERN, "wolf", "lonely", "Varg", "at the edge of the forest", "a white owl"),
    (_THE_LANTERN, "dog", "loyal", "Bella", "beside the old mill", "a black crow"),
    (_THE_LANTERN, "dragon", "shy", "Ember", "on top of a mountain", "a little mouse"),
    (_THE_LANTERN, "princess", "brave", "Ada", "in a castle of stone", "a young thief"),
    (_THE_RACE, "turtle", "calm", "Tilda", "by a quiet lake", "the proud hare"),
    (_THE_RACE, "penguin", "cheerful", "Pablo", "on a cold island", "the fast seal"),
    (_THE_RACE, "elephant", "kind", "Ella", "in the high grass", "the swift gazelle"),
    (_THE_RACE, "snail", "stubborn", "Silvio", "in a garden of roses", "the busy ant"),
)

STORIES = tuple(
    (hero, plot.format(hero=hero, trait=trait, name=name, home=home, friend=friend))
    for plot, hero, trait, name, home, friend in _CASTS
)
