"""Words for tasks that need many: short English ones, and compounds of two, such as riverlamp, each in a fixed order.

No plain word stands inside another, nor a compound, so that an answer that holds one does not hold another unasked.
"""

from __future__ import annotations

from functools import cache

HEADS = """
acorn amber anvil apple april arrow aspen autumn badger bamboo barley basil beacon birch bramble brass brick bronze
canal candle canvas cedar cherry chestnut cinder cliff clover cobalt comet copper coral cotton crystal desert dragon
eagle ember falcon feather fern flint forest frost garden ginger glacier gold granite harbour hazel heather hermit
honey island ivory ivy jade jasmine juniper kettle lantern laurel lemon lilac linen lotus maple marble market meadow
melon mirror morning moss mountain nettle nickel night north nutmeg oak ocean olive onyx orchard otter paper pearl
pebble pepper pilot pine plum poppy prairie quartz quill raven ribbon river saffron salmon satin shadow silver slate
snow south spring summer sunset thistle thunder timber tulip tundra valley velvet violet walnut willow window
winter
"""
TAILS = """
back bank bark barn bath bead beam bell belt bench bird blade board boat bolt bone book boot bowl box bridge broom
brush bucket cage cap cart case chain chair chest clip cloth coat comb cord crate crown cup dish dock door drum farm
fence field flag flute frame gate glove glue grove guard hall hammer hat hook horn house jar key kite knot ladder lamp
latch leaf line lock loft mask mast mat mill mug nail net oven path peg pin pipe plate pond pot press pump rack rail
ring road roof room rope sack sail saw scarf screw seat shed shelf ship shoe shop sign sled spoon stair stamp stool
stove tent thread tile tool tower track tray trunk wagon wall wheel whistle yard
"""
QUALITIES = """
able bold brave bright broad busy calm careful clean clever cold cool damp dark deep dry eager early fair fast fierce
fine firm fresh gentle glad grand great happy hasty heavy high honest huge humble keen kind large late lazy light
lively lone loud lucky merry mild narrow neat new noble odd old pale plain polite proud quick quiet rapid rare ready
rich rough round sharp shiny short shy silent simple slim slow small smooth soft solid steady steep still strange
strong sudden sweet swift tall tame thick thin tidy tiny tough warm weary wet wide wild wise young
"""


@cache
def qualities() -> tuple[str, ...]:
    """Some ninety adjectives."""
    return tuple(QUALITIES.split())


@cache
def plain_words() -> tuple[str, ...]:
    """Some three hundred words of a token or two, in alphabetical order."""
    words = {*HEADS.split(), *TAILS.split(), *QUALITIES.split()}
    return tuple(sorted(word for word in words if not any(word in other for other in words - {word})))


@cache
def compound_words() -> tuple[str, ...]:
    """Some fifteen thousand words, in alphabetical order."""
    return tuple(sorted(f"{head}{tail}" for head in HEADS.split() for tail in TAILS.split()))
