// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! From a device's configuration to a device in a slot of the board.

use super::{Machine, failed};
use crate::vm::StartError;

impl Machine {
    /// Plug in all devices of the configuration, in an order that guests see as stable slot numbers.
    pub(super) fn plug_all(&mut self) -> Result<(), StartError> {
        self.board.assign_bars().map_err(failed)
    }
}
