// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! A reader of flattened device trees (Devicetree Specification 0.4, chapter 5) in guest memory.

use ecr_vmm::hypervisor::fake::GuestCpu;

use crate::rig::read;

const MAGIC: u32 = 0xD00D_FEED;
const BEGIN_NODE: u32 = 1;
const END_NODE: u32 = 2;
const PROPERTY: u32 = 3;
const NOP: u32 = 4;

/// A property of the root's child `node`, in the tree at `tree`.
pub(crate) fn property(cpu: &GuestCpu, tree: u64, node: &str, name: &str) -> Option<Vec<u8>> {
    let word = |at: u64| u32::from_be_bytes(read(cpu, at));
    let text = |mut at: u64| {
        let mut text = String::new();
        loop {
            match read::<1>(cpu, at) {
                [0] => return text,
                [byte] => text.push(byte.into()),
            }
            at += 1;
        }
    };
    assert_eq!(word(tree), MAGIC);
    let (mut at, strings) = (tree + u64::from(word(tree + 8)), tree + u64::from(word(tree + 12)));
    let mut path: Vec<String> = Vec::new();
    loop {
        let token = word(at);
        at += 4;
        match token {
            BEGIN_NODE => {
                let name = text(at);
                at += (name.len() as u64 + 1).next_multiple_of(4);
                path.push(name);
            }
            END_NODE => drop(path.pop()),
            PROPERTY => {
                let (len, key) = (u64::from(word(at)), text(strings + u64::from(word(at + 4))));
                at += 8;
                if path == ["", node] && key == name {
                    let mut value = vec![0; len as usize];
                    cpu.read(at, &mut value);
                    return Some(value);
                }
                at += len.next_multiple_of(4);
            }
            NOP => {}
            _ => return None,
        }
    }
}
