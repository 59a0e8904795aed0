//! The guide is true: its code is that of a program that runs.
#![allow(clippy::unwrap_used)]

const GUIDE: &str = include_str!("../../../docs/guide.md");
const PROGRAM: &str = include_str!("../../../kuma-core/examples/guide.rs");

/// Without what rustfmt decides.
fn bare(text: &str) -> String {
    let bare: String = text.chars().filter(|letter| !letter.is_whitespace()).collect();
    bare.replace(",}", "}").replace(",)", ")")
}

#[test]
fn every_block_of_the_guide_stands_in_the_example() {
    let program = bare(PROGRAM);
    let blocks: Vec<&str> = GUIDE.split("```rust\n").skip(1).map(|rest| rest.split("```").next().unwrap()).collect();
    assert!(blocks.len() > 5);
    for block in blocks {
        assert!(program.contains(&bare(block)), "not in the example:\n{block}");
    }
}
