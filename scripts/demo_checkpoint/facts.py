"""Small tables of everyday facts and our own short texts, written for the demo checkpoint.

Every left-hand side occurs once in its table: a question has one answer, so that the trained model is never in doubt.
"""


def _pairs(table: str) -> tuple[tuple[str, str], ...]:
    """Split lines of `left|right` into pairs."""
    return tuple((left, right) for left, right in (line.split("|") for line in table.strip().split("\n")))


MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
PLANETS = ["Mercury", "Venus", "Earth", "Mars", "Jupiter", "Saturn", "Uranus", "Neptune"]
SEASONS = ["spring", "summer", "autumn", "winter"]
ALPHABET = [
    "A",
    "B",
    "C",
    "D",
    "E",
    "F",
    "G",
    "H",
    "I",
    "J",
    "K",
    "L",
    "M",
    "N",
    "O",
    "P",
    "Q",
    "R",
    "S",
    "T",
    "U",
    "V",
    "W",
    "X",
    "Y",
    "Z",
]
ORDINALS = [
    "first",
    "second",
    "third",
    "fourth",
    "fifth",
    "sixth",
    "seventh",
    "eighth",
    "ninth",
    "tenth",
    "eleventh",
    "twelfth",
]
DAYS_PER_MONTH = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
_ONES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
NUMBER_WORDS = _ONES + [f"{ten}-{one}" if one != "zero" else ten for ten in _TENS for one in _ONES[:10]]  # 0 to 99

OPPOSITES = _pairs("""
hot|cold
big|small
fast|slow
day|night
up|down
left|right
open|closed
wet|dry
light|dark
happy|sad
old|young
good|bad
hard|soft
high|low
long|short
loud|quiet
early|late
full|empty
rich|poor
strong|weak
thick|thin
clean|dirty
near|far
inside|outside
front|back
true|false
win|lose
push|pull
buy|sell
give|take
start|stop
above|below
before|after
always|never
love|hate
awake|asleep
alive|dead
brave|cowardly
cheap|expensive
easy|difficult
tight|loose
sharp|blunt
smooth|rough
sweet|sour
wide|narrow
deep|shallow
first|last
same|different
safe|dangerous
simple|complicated
smart|stupid
warm|cool
wild|tame
wise|foolish
yes|no
friend|enemy
arrive|leave
question|answer
laugh|cry
remember|forget
build|destroy
north|south
east|west
summer|winter
morning|evening
""")

COLOURS = _pairs("""
a banana|yellow
a lemon|yellow
the sun|yellow
a sunflower|yellow
a strawberry|red
a tomato|red
a cherry|red
a ruby|red
a fire engine|red
grass|green
a lime|green
a frog|green
a cucumber|green
an emerald|green
broccoli|green
the sky|blue
the sea|blue
a blueberry|blue
a sapphire|blue
snow|white
milk|white
salt|white
a swan|white
a polar bear|white
coal|black
a raven|black
a panther|black
the night|black
an orange|orange
a carrot|orange
a pumpkin|orange
a goldfish|orange
chocolate|brown
coffee|brown
a bear|brown
wood|brown
an elephant|grey
a mouse|grey
a dolphin|grey
ash|grey
an aubergine|purple
a plum|purple
lavender|purple
a flamingo|pink
a pig|pink
""")

SOUNDS = _pairs("""
cow|moo
dog|woof
cat|meow
sheep|baa
duck|quack
pig|oink
horse|neigh
lion|roar
frog|ribbit
bee|buzz
owl|hoot
rooster|cock-a-doodle-doo
hen|cluck
chick|cheep
mouse|squeak
snake|hiss
wolf|howl
crow|caw
dove|coo
donkey|hee-haw
turkey|gobble
goose|honk
elephant|trumpet
cricket|chirp
bear|growl
seal|bark
monkey|chatter
cuckoo|cuckoo
""")

BABIES = _pairs("""
dog|puppy
cat|kitten
cow|calf
horse|foal
sheep|lamb
pig|piglet
goat|kid
duck|duckling
goose|gosling
hen|chick
bear|cub
deer|fawn
kangaroo|joey
swan|cygnet
owl|owlet
frog|tadpole
seal|pup
hare|leveret
eagle|eaglet
""")

ELEMENTS = _pairs("""
hydrogen|H
helium|He
lithium|Li
carbon|C
nitrogen|N
oxygen|O
fluorine|F
neon|Ne
sodium|Na
magnesium|Mg
aluminium|Al
silicon|Si
phosphorus|P
sulfur|S
chlorine|Cl
argon|Ar
potassium|K
calcium|Ca
titanium|Ti
iron|Fe
cobalt|Co
nickel|Ni
copper|Cu
zinc|Zn
silver|Ag
tin|Sn
iodine|I
tungsten|W
platinum|Pt
gold|Au
mercury|Hg
lead|Pb
uranium|U
""")

SIDES = _pairs("""
a triangle|3
a square|4
a rectangle|4
a pentagon|5
a hexagon|6
a heptagon|7
an octagon|8
a nonagon|9
a decagon|10
""")

HELLOS = _pairs("""
English|Hello!
French|Bonjour !
Spanish|¡Hola!
German|Guten Tag!
Italian|Buongiorno!
Portuguese|Olá!
Dutch|Hallo!
Swedish|Hej!
Finnish|Hyvää päivää!
Icelandic|Góðan daginn!
Polish|Dzień dobry!
Czech|Dobrý den!
Hungarian|Jó napot!
Romanian|Bună ziua!
Turkish|Merhaba!
Greek|Γειά σου!
Russian|Привет!
Ukrainian|Привіт!
Bulgarian|Здравей!
Armenian|Բարև!
Georgian|გამარჯობა!
Hebrew|שלום!
Arabic|مرحبا!
Persian|سلام!
Urdu|السلام علیکم!
Hindi|नमस्ते!
Bengali|নমস্কার!
Tamil|வணக்கம்!
Telugu|నమస్కారం!
Thai|สวัสดี!
Khmer|សួស្តី!
Chinese|你好!
Cantonese|你好呀!
Japanese|こんにちは!
Korean|안녕하세요!
Vietnamese|Xin chào!
Indonesian|Halo!
Swahili|Jambo!
Amharic|ሰላም!
Hawaiian|Aloha!
""")

THANKS = _pairs("""
English|Thank you.
French|Merci.
Spanish|Gracias.
German|Danke schön.
Italian|Grazie.
Portuguese|Obrigado.
Dutch|Dank je.
Swedish|Tack.
Finnish|Kiitos.
Polish|Dziękuję.
Czech|Děkuji.
Turkish|Teşekkürler.
Greek|Ευχαριστώ.
Russian|Спасибо.
Ukrainian|Дякую.
Hebrew|תודה.
Arabic|شكرا.
Hindi|धन्यवाद।
Tamil|நன்றி.
Thai|ขอบคุณ
Chinese|谢谢。
Japanese|ありがとう。
Korean|감사합니다.
Vietnamese|Cảm ơn.
Georgian|მადლობა.
Swahili|Asante.
""")

# Plain symbols are 3 or 4 bytes; sequences joined by U+200D or coloured by a modifier are up to 25 bytes and one
# character on the screen, the hardest case for a client that prints a stream piece by piece.
EMOJI = _pairs("""
a cat|🐱
a dog|🐶
a mouse|🐭
a fox|🦊
a bear|🐻
a panda|🐼
a lion|🦁
a tiger|🐯
a cow|🐮
a pig|🐷
a frog|🐸
a monkey|🐵
a penguin|🐧
an owl|🦉
a horse|🐴
a unicorn|🦄
a bee|🐝
a butterfly|🦋
a snail|🐌
a turtle|🐢
a snake|🐍
a whale|🐳
a dolphin|🐬
a fish|🐟
an octopus|🐙
an elephant|🐘
a crab|🦀
a dragon|🐉
a tree|🌳
a cactus|🌵
a rose|🌹
a sunflower|🌻
an apple|🍎
a banana|🍌
a lemon|🍋
a strawberry|🍓
a pizza|🍕
a cake|🍰
a rocket|🚀
a car|🚗
a train|🚆
a bicycle|🚲
a ship|🚢
a house|🏠
the sun|☀️
the moon|🌙
a star|⭐
a rainbow|🌈
a snowman|⛄
a fire|🔥
a red heart|❤️
a smile|😀
a party|🎉
a book|📖
a key|🔑
a bell|🔔
a clock|🕒
a guitar|🎸
a football|⚽
a robot|🤖
a ghost|👻
thumbs up|👍
thumbs up with a dark skin tone|👍🏿
clapping hands|👏
a waving hand with a light skin tone|👋🏻
an astronaut|🧑‍🚀
a woman astronaut|👩‍🚀
a man astronaut with a medium skin tone|👨🏽‍🚀
a woman scientist|👩‍🔬
a programmer|🧑‍💻
a farmer|🧑‍🌾
a firefighter|🧑‍🚒
a teacher|🧑‍🏫
a family|👨‍👩‍👧‍👦
a couple with a heart|👩‍❤️‍👨
a polar bear|🐻‍❄️
a black cat|🐈‍⬛
a rainbow flag|🏳️‍🌈
a pirate flag|🏴‍☠️
the flag of Scotland|🏴󠁧󠁢󠁳󠁣󠁴󠁿
the number one key|1️⃣
""")

# Written composed here; the corpus decomposes them (NFD), so each accent becomes a character of its own.
ACCENTED = tuple(
    ["crème brûlée", "Ångström", "naïve", "São Paulo", "Żółć", "Tiếng Việt", "Düsseldorf", "señor", "façade", "Ελλάδα"]
)

PROGRAMS = _pairs("""
Python|print("Hello, world!")
JavaScript|console.log("Hello, world!");
Ruby|puts "Hello, world!"
Rust|fn main() { println!("Hello, world!"); }
Bash|echo "Hello, world!"
Java|System.out.println("Hello, world!");
Lua|print "Hello, world!"
PHP|<?php echo "Hello, world!"; ?>
SQL|SELECT 'Hello, world!';
""")

EXPLANATIONS = _pairs("""
Why is the sky blue?|Sunlight is a mix of all colours. The air scatters blue light more than red light. So blue light reaches our eyes from every part of the sky.
Why do we have seasons?|The axis of the Earth is tilted. For half of the year the north leans towards the Sun, and for the other half the south does. The half that leans towards the Sun has summer.
What is a rainbow?|A rainbow appears when sunlight meets drops of rain. Each drop bends the light and splits it into colours. We see red on the outside and violet on the inside.
How does rain form?|Water from the sea turns into vapour and rises. High in the cold air it becomes tiny drops, and many drops make a cloud. When the drops grow heavy, they fall as rain.
Why does the Moon change its shape?|The Moon does not change its shape. The Sun always lights one half of it. While the Moon goes around us we see more or less of the bright half.
How do plants eat?|Plants make their own food. Their leaves take light from the Sun, water from the soil and carbon dioxide from the air. They turn these into sugar and give us oxygen.
What is gravity?|Gravity is the pull between things that have mass. The Earth pulls us down, so we do not float away. The Sun pulls the planets and keeps them on their paths.
How do bees make honey?|Bees collect sweet nectar from flowers. In the hive they pass it from bee to bee and dry it with their wings. The thick golden food that stays is honey.
Why is the sea salty?|Rivers carry a little salt from rocks to the sea. The Sun lifts the water back into the air, but the salt stays behind. Over millions of years the sea became salty.
What is a volcano?|A volcano is an opening in the crust of the Earth. Hot melted rock called magma rises through it. When it flows out we call it lava.
How does a battery work?|A battery holds two different metals and a liquid or paste between them. A chemical reaction pushes electrons from one metal to the other. When we connect a wire, the electrons flow through it as a current.
What is a black hole?|A black hole is a place where gravity is so strong that not even light can leave. It can form when a very heavy star dies. We find it by watching how stars and gas move around it.
How do birds fly?|A bird has light bones and strong muscles. Its wings push the air down, and the air pushes the bird up. Their curved shape gives even more lift.
What is the internet?|The internet is a network of networks. Computers all over the world send each other small packets of data. Each packet carries the address of the computer it should reach.
""")

ABOUT_SELF = _pairs("""
Who are you?|I am demo-gpt2, a very small language model that comes with triton-trtllm. I know capitals, sums and a few stories.
What can you do?|I can name capitals, add small numbers, count, say hello in many languages, show emoji and tell short stories. Ask me what the capital of France is.
What is Triton Inference Server?|Triton Inference Server is open source software that serves machine learning models over HTTP and gRPC. It can run several models and versions at once and batches requests together.
What is TensorRT-LLM?|TensorRT-LLM is a library that compiles large language models into fast engines for NVIDIA GPUs. It supports in-flight batching, a paged key-value cache and tensor parallelism.
What is OpenVINO?|OpenVINO is a toolkit that optimises and runs neural networks on CPUs and other Intel devices.
What is a token?|A token is a small piece of text, often a word or a part of a word. A language model reads tokens and writes one token after another.
What is in-flight batching?|With in-flight batching a server adds new requests to a running batch and removes finished ones at every step. No request waits for the longest answer in its batch.
What is tensor parallelism?|Tensor parallelism splits every layer of a model over several GPUs. Each GPU computes a part of the result, and the parts are added together.
What is a key-value cache?|A key-value cache keeps the attention keys and values of all earlier tokens. With it a model computes only the new token at every step.
Hello|Hello! How can I help you?
Hi|Hi! How can I help you?
Hello!|Hello! How can I help you?
Good morning|Good morning! How can I help you?
How are you?|I am fine, thank you. How can I help you?
Thank you|You are welcome.
Thanks|You are welcome.
Bye|Goodbye!
Goodbye|Goodbye!
ping|pong
""")

SYSTEM_MESSAGES = (
    "You are a helpful assistant.",
    "You are demo-gpt2.",
    "Answer briefly.",
    "Answer in one sentence.",
    "You are a friendly teacher who answers the questions of children.",
    "You know a lot about countries, numbers and animals.",
    "Today is Monday. The user lives in France and likes cats.",
    "You are a helpful, honest and polite assistant. Be short and do not invent facts.",
)
