//! What probes are written with: common words, places and neutral sentences, all our own.

/// Keys of pairs.
pub(super) const WORDS: &[&str] = &[
    "anchor", "apple", "arrow", "badge", "basket", "beach", "bell", "bench", "blanket", "board",
    "boat", "bottle", "box", "branch", "bread", "brick", "bridge", "brush", "bucket", "button",
    "cabin", "cable", "cake", "camera", "candle", "canvas", "card", "carpet", "castle", "chain",
    "chair", "chalk", "cheese", "church", "circle", "cliff", "clock", "cloth", "cloud", "coast",
    "coat", "coffee", "coin", "collar", "comb", "copper", "corn", "cotton", "cradle", "crown",
    "cup", "curtain", "desk", "diamond", "dish", "door", "drawer", "dress", "drum", "dust",
    "eagle", "engine", "fabric", "farm", "feather", "fence", "field", "finger", "flag", "flame",
    "floor", "flour", "flower", "forest", "fork", "fountain", "frame", "garden", "gate", "glass",
    "glove", "gold", "grain", "grape", "grass", "guitar", "hammer", "handle", "harbor", "hat",
    "hill", "honey", "hook", "horse", "hotel", "house", "island", "jacket", "jar", "kettle", "key",
    "kitchen", "knife", "ladder", "lake", "lamp", "leaf", "leather", "lemon", "letter", "library",
    "lion", "lock", "magnet", "map", "marble", "market", "mask", "meadow", "medal", "melon",
    "mirror", "moon", "mountain", "needle", "nest", "net", "notebook", "ocean", "onion", "orange",
    "oven", "paint", "palace", "paper", "park", "pearl", "pencil", "pepper", "piano", "pillow",
    "pipe", "plate", "pocket", "pond", "potato", "powder", "prison", "puzzle", "rabbit", "radio",
    "rail", "rain", "ribbon", "rice", "ring", "river", "road", "robe", "rocket", "roof", "rope",
    "rose", "saddle", "salt", "sand", "scarf", "school", "seed", "shadow", "shell", "shirt",
    "shoe", "shovel", "silk", "silver", "sink", "skirt", "smoke", "snow", "soap", "spoon",
    "spring", "stamp", "star", "station", "stone", "stove", "straw", "street", "sugar", "table",
    "tail", "temple", "tent", "thread", "ticket", "tiger", "tile", "tower", "towel", "train",
    "tray", "tree", "tunnel", "valley", "vase", "velvet", "village", "violin", "wagon", "wall",
    "water", "wheel", "whistle", "window", "wing", "wire", "wolf", "wood", "wool", "yard", "zebra",
];

/// Where codes belong.
pub(super) const PLACES: &[&str] = &[
    "north tower",
    "old mill",
    "green archive",
    "river station",
    "stone cellar",
    "winter garden",
    "east gate",
    "small chapel",
    "blue workshop",
    "harbour office",
    "upper library",
    "grain store",
    "glass pavilion",
    "school kitchen",
    "market hall",
    "post room",
];

/// Hay: nothing in it is a number or a code.
pub(super) const SENTENCES: &[&str] = &[
    "The shop on the corner opens at nine and closes in the late afternoon.",
    "Most of the houses in the street have a small garden at the back.",
    "In autumn the leaves cover the path that leads down to the lake.",
    "A bus stops near the town hall every twenty minutes during the week.",
    "The baker takes the first loaves out of the oven before it gets light.",
    "Children walk to school along the canal and come home by the same way.",
    "Rain is expected in the hills, while the coast should stay dry.",
    "The museum shows old tools that farmers used to work the land.",
    "On market days the square is full of stalls with fruit and cheese.",
    "Two painters spent the summer restoring the ceiling of the theatre.",
    "The ferry crosses the bay in less than half an hour when the sea is calm.",
    "Many people like to read the newspaper with a cup of tea in the morning.",
    "The old clock on the tower is a few minutes slow, and nobody minds.",
    "Behind the barn there is a row of apple trees that still bear fruit.",
    "The choir meets on Thursdays and practises for about two hours.",
    "A new bridge was built so that carts could cross without getting wet.",
    "The gardener waters the plants in the evening, when it is cooler.",
    "Snow fell during the night and made the roads quiet for a while.",
    "The carpenter keeps his wood in a dry shed next to the workshop.",
    "Visitors often ask for the way to the castle and are sent uphill.",
    "The train to the south leaves from the second platform.",
    "Bees from the hives near the meadow fly as far as the orchard.",
    "Most letters arrive before noon, and parcels come a little later.",
    "The fishermen mend their nets on the pier when the wind is too strong.",
    "An old map in the inn shows how the river changed its course.",
    "The teacher put the books back on the shelf and wiped the board.",
    "Some of the stones in the wall were taken from an earlier building.",
    "The cat sleeps on the warm bricks beside the stove for most of the day.",
    "In spring the fields turn yellow, and one can see them from far away.",
    "The village has a small hall where people dance on holidays.",
    "A neighbour looks after the hens while the family is away.",
    "The road bends twice before it reaches the forest.",
    "Fresh paint made the boats look new, though they were quite old.",
    "The tailor measures twice, cuts once, and rarely wastes any cloth.",
    "Lamps along the promenade are lit as soon as the sun goes down.",
    "The soup is cooked slowly with onions, carrots and a little pepper.",
    "A light wind from the west moved the curtains in the open window.",
    "The doctor visits the farms in the valley once every month.",
    "Swallows come back to the same nests under the roof each year.",
    "The library lends its books for three weeks at a time.",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_there_twice_or_gives_a_code_away() {
        for list in [WORDS, PLACES, SENTENCES] {
            let mut sorted = list.to_vec();
            sorted.sort_unstable();
            sorted.dedup();
            assert_eq!(sorted.len(), list.len());
            let told =
                list.iter().any(|text| text.contains(char::is_numeric) || text.contains("code"));
            assert!(!told);
        }
    }
}
